"""What a strategy decided about one request, and what that would cost: sans-I/O.

    send    source ──[begin, end)──> grant of the decode engine
    start   the decode engine computes [begin, num_tokens) itself, or the last sender samples the first token

The cost is that of prediction.py put together: an engine first works off what is ahead of it, the senders
work side by side, and the decode engine's own share waits for its own queue only (its KV arrives while it
computes). What nobody has measured counts as nothing, as everywhere. Two decisions about one request are
compared with each other; neither number is a promise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from microserve.services.router.engines.prediction import EngineView, predicted_ttft_s


class Send(NamedTuple):
    """One ``remote_send`` that had something to send."""

    source: str
    target: str
    begin: int
    end: int


@dataclass(slots=True)
class Decision:
    """Filled in while the strategy decides."""

    sends: list[Send] = field(default_factory=list)
    engine_id: str = ""
    """Where it generates; empty: not decided."""
    begin: int = 0
    """First prompt token that this engine computes itself (or has in its own cache)."""
    awaits_first: bool = False
    """A sender samples the first token."""


class Cost(NamedTuple):
    ttft_s: float
    computed_tokens: int
    """On all engines together."""
    sent_tokens: int


def cost_of(
    decision: Decision,
    num_tokens: int,
    cached: Mapping[str, int],
    views: Mapping[str, EngineView],
    transfer_s: Callable[[str, str, int], float],
) -> Cost | None:
    """As of the moment at which ``views`` were taken; None when an engine of the decision was not there.

    ``cached``: prompt tokens that engines hold from the start, by id. ``transfer_s(source, target, tokens)``.
    """
    used = {decision.engine_id, *(send.source for send in decision.sends)}
    if not used <= views.keys():
        return None
    num_computed, num_sent, arrived_s = 0, 0, 0.0
    for send in decision.sends:
        num_here = max(0, send.end - cached.get(send.source, 0))
        num_computed += num_here
        num_sent += send.end - send.begin
        sending_s = transfer_s(send.source, send.target, send.end - send.begin)
        source = views[send.source]
        arrived_s = max(arrived_s, predicted_ttft_s(source, 0) + _compute_s(source, num_here), sending_s)
    num_known = decision.begin or cached.get(decision.engine_id, 0)
    num_own = 0 if decision.awaits_first else max(0, num_tokens - num_known)
    view = views[decision.engine_id]
    ready_s = max(arrived_s, predicted_ttft_s(view, 0))
    return Cost(ready_s + _compute_s(view, num_own), num_computed + num_own, num_sent)


def _compute_s(view: EngineView, num_tokens: int) -> float:
    rate = view.report.prefill_tokens_per_s
    return num_tokens / rate if rate > 0.0 else 0.0
