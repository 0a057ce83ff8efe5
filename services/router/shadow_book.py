"""How shadow versions fare: sums over their decisions, sans-I/O. What is told of them is ``ShadowScore``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from microserve.protocol.messages.control import ShadowScore
from microserve.services.router.rollout.score import Cost

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
