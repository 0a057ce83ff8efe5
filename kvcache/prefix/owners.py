"""Sets of engines as ints: bit e is set when engine e is in.

Owns what the engine of a bit is called, and one object for each set that is in use: equal big ints are not
one object by themselves, and an index holds a set for every block. Knows no blocks.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

EVERY_ENGINE = -1

_OBJECT_NBYTES = 48
_MIN_SETS = 4096
_MAX_NAMES = 256


class OwnerSets:
    def __init__(self) -> None:
        self.ids: dict[int, str] = {}
        """Bit -> engine id."""
        self._sets: dict[int, int] = {}
        self._max_sets = _MIN_SETS
        self._names: dict[int, tuple[str, ...]] = {}

    @property
    def nbytes(self) -> int:
        """Of the sets' objects and their table."""
        return self.table_nbytes + len(self._sets) * _OBJECT_NBYTES

    @property
    def table_nbytes(self) -> int:
        return sys.getsizeof(self._sets)

    def join(self, bit: int, engine_id: str) -> None:
        """No set that is in use may have the bit yet."""
        self.ids[bit] = engine_id
        self._names.clear()

    def names(self, owners: int) -> tuple[str, ...]:
        """Engine ids, in the order of their bits."""
        names = self._names.get(owners)
        if names is None:
            if len(self._names) >= _MAX_NAMES:
                self._names.clear()
            ids = sorted(self.ids.items())
            names = self._names[owners] = tuple(engine_id for bit, engine_id in ids if owners & bit)
        return names

    def one(self, owners: int) -> int:
        """The one object for this set."""
        return self._sets.setdefault(owners, owners)

    @property
    def is_full(self) -> bool:
        """There may be many sets by now that are out of use: call :meth:`keep`."""
        return len(self._sets) > self._max_sets

    def keep(self, used: Iterable[int], num_blocks: int) -> None:
        """``used``: the sets that are in use; so many blocks have one."""
        self._sets = {owners: owners for owners in used}
        self._max_sets = _MIN_SETS + 2 * len(self._sets) + num_blocks // 4

    def without(self, bit: int) -> dict[int, int]:
        """Every set -> the one without that engine; from now on, only those are there."""
        rests = {owners: owners & ~bit for owners in self._sets}
        self._sets = {owners: owners for owners in rests.values()}
        return {owners: self._sets[rest] for owners, rest in rests.items()}
