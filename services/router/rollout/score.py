"""What a strategy decided about one request, and what that would cost: sans-I/O.

    send    source ──[begin, end)──> grant of the decode engine
    start   the decode engine computes [begin, num_tokens) itself, or the last sender samples the first token

The cost is that of prediction.py put together: an engine first works off what is ahead of it, the senders
work side by side, and the decode engine's own share waits for its own queue only (its KV arrives while it
computes). What nobody has measured counts as nothing, as everywhere. Two decisions about one request are
compared with each other; neither number is a promise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from microserve.protocol.messages.strategy.control import ShadowScore
from microserve.services.router.engines.prediction import EngineView, predicted_ttft_s
from microserve.services.router.request.decision import Decision


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


Key = tuple[str, int]
"""Strategy and version."""


@dataclass(slots=True)
class _Sums:
    num_priced: int = 0
    num_errors: int = 0
    num_agreed: int = 0
    shadow: list[float] = field(default_factory=lambda: [0.0] * len(Cost._fields))
    served: list[float] = field(default_factory=lambda: [0.0] * len(Cost._fields))


class ShadowBook:
    """By strategy and version."""

    def __init__(self) -> None:
        self._sums: dict[Key, _Sums] = {}

    def add(self, key: Key, shadow: Cost | None, served: Cost | None, agreed: bool) -> None:
        """One decision: what it would cost beside what was done, or None for a mistake."""
        sums = self._sums.setdefault(key, _Sums())
        if shadow is None or served is None:
            sums.num_errors += 1
            return
        sums.num_priced += 1
        sums.num_agreed += agreed
        for total, cost in ((sums.shadow, shadow), (sums.served, served)):
            for column, value in enumerate(cost):
                total[column] += value

    def keep(self, keys: Iterable[Key]) -> None:
        """Forget all others."""
        kept = set(keys)
        self._sums = {key: sums for key, sums in self._sums.items() if key in kept}

    def scores(self) -> list[ShadowScore]:
        return [_score(key, sums) for key, sums in self._sums.items()]


def _score(key: Key, sums: _Sums) -> ShadowScore:
    num = max(1, sums.num_priced)
    (ttft_s, computed, sent), (served_ttft_s, served_computed, served_sent) = (
        [total / num for total in totals] for totals in (sums.shadow, sums.served)
    )
    return ShadowScore(
        *key,
        num_decisions=sums.num_priced + sums.num_errors,
        num_errors=sums.num_errors,
        num_agreed=sums.num_agreed,
        ttft_s=ttft_s,
        served_ttft_s=served_ttft_s,
        computed_tokens=computed,
        served_computed_tokens=served_computed,
        sent_tokens=sent,
        served_sent_tokens=served_sent,
    )
