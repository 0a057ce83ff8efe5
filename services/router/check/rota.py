"""Whose turn it is: which pair of engines, and which router. Sans-I/O.

All routers go through one list of pairs, each through its own part of it: with *n* routers every *n*-th pair
is one's, so none is checked twice and a router that is gone leaves its part to the others. The list goes in
rings (each engine with the next one, then with the one after that), so that after as many checks as there are
engines each has sent and each has received. Within a part the pair comes first that was checked longest ago;
every other turn is one of a pair that is out of use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from microserve.protocol.messages.engine_info import PREP_RECV, REMOTE_SEND, EngineInfo
from microserve.protocol.messages.kv.geometry import difference

Pair = tuple[str, str]
"""Source and target; an empty target: nobody is there to send to, the source is checked alone."""


def pairs_of(infos: Iterable[EngineInfo]) -> list[Pair]:
    """All pairs that can be checked, in rings. Engines that say no class promise nothing."""
    classes: dict[str, list[EngineInfo]] = {}
    for info in sorted(infos, key=lambda info: info.engine_id):
        if info.numerics.name:
            classes.setdefault(info.numerics.name, []).append(info)
    found: list[Pair] = []
    for shift in range(1, max(map(len, classes.values()), default=0)):
        for ring in classes.values():
            if shift < len(ring):
                pairs = ((each, ring[(n + shift) % len(ring)]) for n, each in enumerate(ring))
                found += [(a.engine_id, b.engine_id) for a, b in pairs if _exchange(a, b)]
    senders = {source for source, _ in found}
    ids = [info.engine_id for ring in classes.values() for info in ring]
    return [(each, "") for each in ids if each not in senders] + found


def _exchange(source: EngineInfo, target: EngineInfo) -> bool:
    can = source.does(REMOTE_SEND) and target.does(PREP_RECV)
    return can and not difference(source.geometry, target.geometry)


class Rota:
    """Of one router."""

    def __init__(self) -> None:
        self._checked: dict[Pair, int] = {}
        """In which turn, by pair."""
        self._turn = 0

    def next(
        self,
        infos: Iterable[EngineInfo],
        routers: Sequence[str],
        own: str,
        *,
        is_free: Callable[[str], bool],
        is_barred: Callable[[Pair], bool],
    ) -> Pair | None:
        """The pair to check now, if there is one whose engines have room for it. ``routers``: all that are
        there, by name; ``own``: ours."""
        part = share_of(pairs_of(infos), routers, own)
        self._checked = {pair: turn for pair, turn in self._checked.items() if pair in part}
        free = [pair for pair in part if all(is_free(each) for each in pair if each)]
        if not free:
            return None
        self._turn += 1
        barred = [pair for pair in free if is_barred(pair)]
        pair = min(barred if barred and self._turn % 2 else free, key=lambda pair: self._checked.get(pair, 0))
        self._checked[pair] = self._turn
        return pair


def share_of(pairs: Sequence[Pair], routers: Sequence[str], own: str) -> dict[Pair, None]:
    """Every n-th, from our place among the routers on; all, as long as nobody has told of us."""
    names = sorted(set(routers))
    if own not in names:
        return dict.fromkeys(pairs)
    return dict.fromkeys(pairs[names.index(own) :: len(names)])
