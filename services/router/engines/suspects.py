"""Which pairs of engines exchange no KV, because a self-check found that their answers differ.

Sans-I/O; ``now`` is of one monotonic clock. What the index says counts for all routers. A router's own
finding counts from the moment of it, whether or not the index is there; and a new life of the index, which
has to hear of everything first, takes nothing back for a while.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from microserve.protocol.messages.check import CACHED, DIFFERS, EQUAL, PairCheck, Suspect

PATIENCE_S = 30.0
"""The index has so long to say what it is told, and what it said in its last life."""

Pair = tuple[str, str]
"""Source and target; an empty target: the source exchanges none at all."""


def marks_of(check: PairCheck) -> tuple[list[Pair], list[Pair]]:
    """What a check takes out of use, and what it puts back."""
    engine, pair = (check.source, ""), check.pair
    if check.outcome == EQUAL:
        return [], [engine, pair]
    if check.outcome != DIFFERS:
        return [], []
    return ([engine], []) if check.differs == CACHED else ([pair], [engine])


class Suspects:
    def __init__(self) -> None:
        self._listed: frozenset[Pair] = frozenset()
        """By the index."""
        self._earlier: frozenset[Pair] = frozenset()
        """By its life before, until :attr:`_earlier_until`."""
        self._earlier_until = 0.0
        self._own: dict[Pair, float] = {}
        """Found here and not yet listed: since when."""

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def pairs(self) -> frozenset[Pair]:
        return self._listed | self._earlier | self._own.keys()

    def take(self, listed: Iterable[Suspect], now: float, *, is_first: bool, knows: bool) -> None:
        """The index lists these. ``is_first``: of this life of it; ``knows``: it is told of checks at all."""
        if is_first and (self._listed or self._earlier):
            self._earlier, self._earlier_until = self._listed | self._earlier, now + PATIENCE_S
        if now >= self._earlier_until:
            self._earlier = frozenset()
        self._listed = frozenset((each.source, each.target) for each in listed)
        if knows:
            self._own = {
                pair: found_at
                for pair, found_at in self._own.items()
                if pair not in self._listed and now - found_at < PATIENCE_S
            }

    def found(self, check: PairCheck, now: float) -> tuple[list[Pair], list[Pair]]:
        """A check of this router is over: what is out of use by it that was not, and what is back."""
        bad, good = marks_of(check)
        known = self.pairs
        new, back = [pair for pair in bad if pair not in known], [pair for pair in good if pair in known]
        self._own.update(dict.fromkeys(bad, now))
        for pair in good:
            self._own.pop(pair, None)
        self._listed -= frozenset(good)
        self._earlier -= frozenset(good)
        return new, back

    def targets_of(self, source: str, engine_ids: Sequence[str]) -> frozenset[str]:
        """Those of ``engine_ids`` to which ``source`` may send none: who sends wrong KV to anybody sends none
        to itself either."""
        pairs = self.pairs
        if not pairs:
            return frozenset()
        if (source, "") in pairs:
            return frozenset(engine_ids)
        barred = {each for each in engine_ids if (source, each) in pairs or (each, "") in pairs}
        return frozenset(barred | {source} if any(each == source for each, _ in pairs) else barred)
