"""The prefix indexes of an index service: one for all engines whose blocks have names in common.

Owns which engine is in which, and how they share the limit in bytes. Does not know how events come in.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

from microserve.kvcache.prefix.index import MIN_MAX_NBYTES, PrefixIndex
from microserve.protocol.errors import QueueFull
from microserve.protocol.messages.engine_info import EngineInfo

Key = tuple[str, int, str]
"""Model, tokens in a block, revision."""


class PrefixIndexes:
    def __init__(self, max_nbytes: int) -> None:
        """``max_nbytes``: of all together."""
        self._max_nbytes = max_nbytes
        self._indexes: dict[Key, PrefixIndex] = {}
        self._keys: dict[str, Key] = {}
        """By engine id."""

    def of_model(self, model: str) -> PrefixIndex | None:
        """The first of the model's; None while no engine serves it."""
        return next((index for key, index in self._indexes.items() if key[0] == model), None)

    def check_room(self, info: EngineInfo) -> None:
        """Raises :class:`QueueFull` where one index more would leave too little for each."""
        room = self._max_nbytes // MIN_MAX_NBYTES
        if _key_of(info) not in self._indexes and len(self._indexes) >= room:
            raise QueueFull(f"index.max_mb has room for {room} models, {info.model} would be one more")

    def join(self, info: EngineInfo) -> PrefixIndex:
        """The one that the engine's events are for."""
        key = self._keys[info.engine_id] = _key_of(info)
        index = self._indexes.get(key)
        if index is None:
            index = self._indexes[key] = PrefixIndex(
                info.block_size, info.model, MIN_MAX_NBYTES, revision=info.revision
            )
            self._share_room()
        return index

    def leave(self, engine_id: str) -> None:
        """Forget what it held, and the index with its last engine. Unknown ids are fine."""
        key = self._keys.pop(engine_id, None)
        if key is None:
            return
        self._indexes[key].remove_engine(engine_id)
        if key not in self._keys.values():
            del self._indexes[key]
            self._share_room()

    def lookup(self, tokens: Sequence[int], salt: str, adapter: str = "") -> dict[str, int]:
        """Over every model: an engine answers for the one that it serves."""
        matched: dict[str, int] = {}
        for index in self._indexes.values():
            matched |= index.lookup(tokens, salt, adapter=adapter)
        return matched

    @property
    def max_nbytes(self) -> int:
        """Of all together."""
        return self._max_nbytes

    @property
    def num_blocks(self) -> int:
        return sum(index.num_blocks for index in self._indexes.values())

    @property
    def nbytes(self) -> int:
        return sum(index.nbytes for index in self._indexes.values())

    @property
    def counters(self) -> Counter[str]:
        """``EventCounters`` of all of them."""
        found: Counter[str] = Counter()
        for index in self._indexes.values():
            found.update(dataclasses.asdict(index.counters))
        return found

    def _share_room(self) -> None:
        """Every index has the same share; one that holds more forgets with its next event."""
        for index in self._indexes.values():
            index.max_nbytes = self._max_nbytes // len(self._indexes)


def _key_of(info: EngineInfo) -> Key:
    return info.model, info.block_size, info.revision
