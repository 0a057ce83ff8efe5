"""What one attempt's strategy saw, chose and said, as it is kept: numbers and names in the order of the wire.

Written in the middle of every ``pick``, so it keeps what lies there anyway, makes no words, and leaves out
what the sight of the engines (sight.py) says already; bounded, whatever a strategy does. Keeps no prompt, no
token and no value of an attribute. Sans-I/O.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from microserve.protocol.messages.strategy.control import Scalar
from microserve.protocol.messages.strategy.decisions import MAX_NOTES, MAX_PICKS
from microserve.services.router.engines.connection import Connection
from microserve.services.router.engines.load import Load, LoadBook
from microserve.services.router.request.decision import Decision
from microserve.services.router.request.sight import Own, Sight, Sights

TOLD_IN_SHORT = 3
"""Picks that a line has room for."""


class Trail:
    """Of one attempt. Times are of the loop's clock, and are kept as seconds after the request had come."""

    __slots__ = ("_came", "_decision", "_head", "_notes", "_num_notes", "_num_picks", "_own", "_picks",
                 "_seen_at", "_sights", "cached", "sight")  # fmt: skip

    def __init__(
        self,
        strategy: str,
        version: int,
        num_tokens: int,
        decision: Decision,
        came: float,
        now: float,
        sights: Sights | None = None,
    ) -> None:
        """``decision`` is filled in by the attempt's actions; ``came``: when the request came here;
        ``sights``: those that the router's requests share."""
        self.cached: Mapping[str, int] = {}
        """Prompt tokens that engines were known to hold, once somebody has asked."""
        self.sight: Sight | None = None
        """Of the engines, at the first pick."""
        self._head = (strategy, version, now - came, num_tokens)
        self._came = came
        self._decision = decision
        self._sights = sights
        self._own: Own = ((), (), ())
        self._seen_at = 0.0
        self._picks: list[tuple[Any, ...]] = []
        """As ``decisions.Pick``."""
        self._num_picks = 0
        self._notes: list[tuple[float, str, Mapping[str, Scalar]]] = []
        self._num_notes = 0

    @property
    def strategy(self) -> str:
        """Its name."""
        return self._head[0]

    @property
    def picked(self) -> list[tuple[str | None, str]]:
        """Label that was asked for, and what decided, of each pick that is kept."""
        return [(pick[1], pick[2]) for pick in self._picks]

    @property
    def is_new(self) -> bool:
        """Nothing has been chosen so far: it still has to :meth:`see`."""
        return not self._num_picks

    def see(
        self,
        connections: Sequence[Connection],
        labels: Sequence[Sequence[str]] | None,
        book: LoadBook,
        now: float,
    ) -> None:
        """The engines as they are now; ``labels``: those that the strategy has given, if it has."""
        if labels is not None:
            self.sight = Sight(connections, labels)
        else:
            self.sight = (self._sights or Sights()).of(connections)
        self._own, self._seen_at = book.columns(self.sight.engine_ids), now

    def choose(
        self,
        label: str | None,
        by: str,
        temperature: float,
        candidates: list[str],
        costs: list[float],
        loads: Sequence[Load],
        chosen: str,
        excluded: Sequence[str],
        numerics: str,
        scored: Sequence[tuple[str, Sequence[float], float]],
        now: float,
    ) -> None:
        """One ``pick``; the arguments are fields of ``decisions.Pick``."""
        self._num_picks += 1
        if self._num_picks > MAX_PICKS:
            return
        tokens = [load.uncached_tokens for load in loads]
        sequences = [load.sequences for load in loads]
        at_s = now - self._came
        among = (candidates, costs, tokens, sequences)
        self._picks.append((at_s, label, by, temperature, *among, chosen, excluded, numerics, scored))

    def note(self, text: str, values: Mapping[str, Scalar], now: float) -> None:
        self._num_notes += 1
        if self._num_notes <= MAX_NOTES:
            self._notes.append((now - self._came, text, values))

    def in_short(self) -> str:
        """A line: ``decode: e1 of 4 by cost; prefill: e0 of 3 by load``."""
        told = "; ".join(self.in_words(TOLD_IN_SHORT))
        num_more = self._num_picks - TOLD_IN_SHORT
        return f"{told}; {num_more} more" if num_more > 0 else told

    def in_words(self, most: int = MAX_PICKS) -> list[str]:
        """One text for each of the first picks."""
        return [f"{p[1] or 'any'}: {p[8]} of {len(p[4])} by {p[2]}" for p in self._picks[:most]]

    def chosen(self) -> list[tuple[float, str, str, str]]:
        """Of each pick: seconds after the request had come, label, by what, and which engine."""
        return [(p[0], p[1] or "any", p[2], p[8]) for p in self._picks]

    def packed(self, *, is_bare: bool = False) -> tuple[Any, ...]:
        """As ``decisions.Attempt``, without the engines, which are :attr:`sight`'s; ``is_bare``: without
        candidates."""
        decision = self._decision
        picks = [_bare(pick) for pick in self._picks] if is_bare else self._picks
        codings, sends = decision.codings, decision.sends
        return (
            *self._head,
            self.cached if not is_bare else {},
            (),
            picks,
            self._num_picks,
            self._notes,
            self._num_notes,
            [(*send, codings.get(send)) for send in sends] if codings else sends,
            decision.engine_id,
            decision.begin,
            decision.awaits_first,
        )

    @property
    def beside(self) -> tuple[Own, float]:
        """What belongs to the sight: this router's own numbers, and when that was."""
        return self._own, self._seen_at


def _bare(pick: tuple[Any, ...]) -> tuple[Any, ...]:
    at_s, label, by, temperature, *_, chosen, _, numerics, _ = pick
    return (at_s, label, by, temperature, (), (), (), (), chosen, (), numerics, ())
