"""How long a prompt would wait for its first token on an engine: what admission refuses by; and what it costs
all who are served to compute it there: what strategies place it by.

Sans-I/O. From what the engine said last, and from our own book, which also knows what is on its way. What
nobody has measured counts as nothing: an engine of which little is known is never too slow. Rules that keep a
refusal from outliving its reason:

- a report counts for ``REPORT_MAX_AGE_S``; then only our own book does, which is empty when nothing runs;
- a prefill rate that nothing has measured for ``RATE_MAX_AGE_S`` is not believed where no prefill waits: the
  next prompt, whatever its length, is let through and measures it again. (A rate from a busy hour would else
  refuse every long prompt for ever, since none comes through that could correct it.)

Source: Mooncake, arXiv 2407.00079, algorithm 1: queued plus own prefill, refused with 429 beyond the bound.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from microserve.protocol.messages.engine import EngineLoad
from microserve.services.router.engines.connection import Connection
from microserve.services.router.engines.load import Load, LoadBook

REPORT_MAX_AGE_S = 1.5
"""Six heartbeats, by default."""
RATE_MAX_AGE_S = 1.5
LATER_SHARE = 0.5
"""Of those who come while an engine is busy, those who cannot go to another one."""
MAX_SHARE = 0.95
"""No engine counts as busy with prefills for more of its time: what is divided by the rest stays finite."""


READS_ONLY = ("",)
"""Where a strategy that hangs may be broken off (../oversight/cut.py)."""


class EngineView(NamedTuple):
    """What is known of one engine at one moment."""

    report: EngineLoad
    report_age_s: float
    own: Load
    """What this router put there."""
    block_size: int
    num_blocks: int
    unplaced_tokens: float = 0.0
    """Its share of the prompt tokens that this router has admitted and not yet placed."""


def engine_view(
    connection: Connection, book: LoadBook, now: float, *, unplaced_tokens: float = 0.0
) -> EngineView:
    """As of ``now``, by the loop's clock."""
    return EngineView(
        connection.load,
        now - connection.load_at,
        book.own(connection.engine_id),
        connection.info.block_size,
        connection.info.num_blocks,
        unplaced_tokens,
    )


def predicted_ttft_s(view: EngineView, num_tokens: int) -> float:
    """Seconds until an engine's first token for a prompt of which it must compute ``num_tokens``.

    The work ahead and the prompt's own at the measured rate, plus the decode steps until a place and blocks
    are free: one engine does both in turn. 0 where nothing has been measured.
    """
    report, rate = view.report, view.report.prefill_tokens_per_s
    ahead = tokens_ahead(view)
    rate_age_s = report.prefill_rate_age_s + view.report_age_s
    is_known = rate > 0.0 and (ahead > 0.0 or rate_age_s < RATE_MAX_AGE_S)
    return _place_wait_s(view, ahead + num_tokens) + ((ahead + num_tokens) / rate if is_known else 0.0)


def tokens_ahead(view: EngineView) -> float:
    """Prompt tokens that the engine computes first: ours, by our own book, and those of other routers.

    The engine cannot say how much of what waits is in its cache and our book can, so of its report only the
    share of sequences that are not ours counts.
    """
    report, reported = view.report, _num_reported(view)
    others = max(0, reported - view.own.sequences)
    others_tokens = report.queued_prefill_tokens * others / reported if others else 0.0
    return view.own.uncached_tokens + view.unplaced_tokens + others_tokens


def _num_reported(view: EngineView) -> int:
    """Sequences on the engine by its own report, if that still counts."""
    if view.report_age_s > REPORT_MAX_AGE_S:
        return 0
    return view.report.num_running + view.report.num_waiting


def _place_wait_s(view: EngineView, num_tokens: float) -> float:
    """Until so many sequences have ended as stand in the way; each of a full batch takes its mean output."""
    report, num_running = view.report, view.report.num_running
    end_s = report.mean_output_tokens * report.decode_step_s
    places, wait_s = report.max_num_seqs, 0.0
    if places:
        in_the_way = max(view.own.sequences, _num_reported(view)) + 1 - places
        wait_s = max(0, in_the_way) * end_s / places
    if num_running and view.report_age_s <= REPORT_MAX_AGE_S:
        missing = num_tokens / view.block_size - report.free_blocks
        held = max(1.0, (view.num_blocks - report.free_blocks) / num_running)
        wait_s = max(wait_s, max(0.0, missing) / held * end_s / num_running)
    return wait_s


# --- what serving costs, all who are there included ------------------------------------------------


def prefill_cost_s(load: Load, report: EngineLoad, num_tokens: int, rate: float) -> float:
    """Seconds until an engine has computed ``num_tokens`` more of a prompt, at ``rate`` tokens a second; plus
    what that costs others: its decodes meanwhile, and the prompts that will come while it is busy with it."""
    work_s, wait_s = num_tokens / rate, load.uncached_tokens / rate
    later = _bounded(report.prefill_share)
    queue_s = LATER_SHARE * later / (1.0 - later) * (wait_s + work_s)
    return wait_s + work_s * (1.0 + held_up(load, report) * load.sequences) + queue_s


def decode_cost_s(load: Load, report: EngineLoad) -> float:
    """Seconds that an average answer takes there, with the prefills that will come between its steps, if they
    go on as they did, and with what it costs the others; 0 where nothing has been measured.

    One more sequence makes each step longer by a token's computation at least, for all of them; and a step
    was measured without those that only come.
    """
    if not load.decode_step_s:
        return 0.0
    token_s = 1.0 / load.prefill_tokens_per_s if load.prefill_tokens_per_s > 0.0 else 0.0
    num_coming = max(0, load.sequences - load.running)
    step_s = load.decode_step_s + (num_coming + load.sequences) * token_s
    return report.mean_output_tokens * step_s / (1.0 - held_up(load, report) * _bounded(report.prefill_share))


def held_up(load: Load, report: EngineLoad) -> float:
    """Share of a prefill's time that decodes of its steps lose; 0: they would take as long without it."""
    if not report.max_num_batched_tokens:
        return 1.0
    full_step_s = report.max_num_batched_tokens / (load.prefill_tokens_per_s or math.inf)
    return max(0.0, 1.0 - load.decode_step_s / full_step_s) if full_step_s else 1.0


def _bounded(share: float) -> float:
    return min(max(share, 0.0), MAX_SHARE)
