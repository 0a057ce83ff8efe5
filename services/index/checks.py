"""What routers' self-checks have found: the last of each pair, and who exchanges no KV by it. Sans-I/O.

Owns what is remembered, and for how long. Routers repeat themselves, so a new life of the index learns it
again. Checks nothing and asks nobody.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import msgspec

from microserve.protocol.messages.check import (
    CACHED,
    DIFFERS,
    EQUAL,
    MAX_REPORTED,
    OUTCOMES,
    PairCheck,
    Suspect,
)
from microserve.protocol.messages.engine_info import EngineInfo

MAX_PAIRS = 1 << 13
"""That are remembered: all of 90 engines. Beyond it the oldest go."""
KEPT_S = 3600.0
"""For so long an engine that is no member may come back to what was found of it."""

Pair = tuple[str, str]
Member = Callable[[str], EngineInfo | None]
"""By engine id; None: it is none."""


class CheckDesk:
    def __init__(self) -> None:
        self._last: dict[Pair, tuple[PairCheck, float]] = {}
        """By pair, and when it was over."""
        self._marks: dict[Pair, float] = {}
        """By source and target, when both were last here; an empty target: the engine does not agree with
        itself."""

    def take(self, router_id: str, checks: Iterable[PairCheck], now: float) -> bool:
        """What a router says. True: other pairs are out of use than before."""
        before = set(self._marks)
        for check in sorted(checks, key=lambda check: -check.age_s):
            if check.source and check.outcome in OUTCOMES:
                self._take(msgspec.structs.replace(check, router_id=router_id), now - max(0.0, check.age_s))
        while len(self._last) > MAX_PAIRS:
            del self._last[next(iter(self._last))]
        return set(self._marks) != before

    def _take(self, check: PairCheck, at: float) -> None:
        known = self._last.get(check.pair)
        if known is not None:
            last, last_at = known
            is_same = (last.router_id, last.number) == (check.router_id, check.number)
            if is_same or at < last_at:
                return
            del self._last[check.pair]  # the newest stand last
        self._last[check.pair] = (check, at)
        engine = (check.source, "")
        if check.outcome == DIFFERS and check.differs == CACHED:
            self._marks.setdefault(engine, at)
        elif check.outcome == DIFFERS:
            self._marks.setdefault(check.pair, at)
        if check.outcome == EQUAL:
            self._marks.pop(check.pair, None)
        if check.outcome == EQUAL or (check.outcome == DIFFERS and check.differs != CACHED):
            self._marks.pop(engine, None)  # its two answers were equal

    def expire(self, member: Member, now: float) -> bool:
        """Forget of whom no check can find any more that they are equal: engines that are gone for long, or
        of other classes by now. True: other pairs are out of use than before."""
        before = len(self._marks)
        for pair in list(self._marks):
            found = [member(each) for each in pair if each]
            infos = [info for info in found if info is not None]
            if len(infos) == len(found):
                self._marks[pair] = now
                classes = {info.numerics.name for info in infos}
                is_over = len(classes) > 1 or "" in classes
            else:
                is_over = now - self._marks[pair] > KEPT_S
            if is_over:
                del self._marks[pair]
        return len(self._marks) != before

    def suspects(self) -> list[Suspect]:
        return [Suspect(*pair) for pair in sorted(self._marks)]

    def report(self, member: Member, now: float) -> list[PairCheck]:
        """The last of each pair that is here, with its age: those that differ, then the newest."""
        here = [
            known
            for pair, known in self._last.items()
            if all(member(each) is not None for each in pair if each)
        ]
        in_pairs = {check.source for check, _ in here if check.target}
        here = [known for known in here if known[0].target or known[0].source not in in_pairs]
        here.sort(key=lambda known: (known[0].outcome != DIFFERS, -known[1]))
        return [msgspec.structs.replace(check, age_s=now - at) for check, at in here[:MAX_REPORTED]]
