"""What an engine that is not ours calls its blocks, translated into our hashes.

Such an engine names blocks by ints or digests of its own making. Its events carry the tokens and the parent,
so our chain is computed beside its names; a removal brings only the name, so the names are remembered.

Used by prefix_index.py, one per foreign engine. A foreign name is never trusted beyond its engine: 64-bit
names of two engines, or of two tenants, may collide.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from microserve.kvcache.prefix.hash import TOKEN_NBYTES, BlockHash, chain_hash, pack_tokens, root_hash
from microserve.protocol.messages.kv.kv_events import BlockStored, WireHash

_HASH_OBJECT_NBYTES = 64
_INT_OBJECT_NBYTES = 48
"""Objects as CPython's allocator hands them out: rounded up to 16."""


@dataclass(slots=True)
class EventCounters:
    """Blocks that an index did not take from events, or took and gave up. Each only grows."""

    evicted_blocks: int = 0
    """Forgotten for want of room."""
    ignored_blocks: int = 0
    """Not a prefix on the engine's device in our block size: another block size, an offload tier, another
    engine's memory, a cache group that keeps no whole prefixes, a nameless adapter, a hash that depends on
    more than tokens, adapter and salt."""
    orphaned_blocks: int = 0
    """Stored by a foreign engine under a parent that is not known, so that they cannot be placed."""
    malformed_blocks: int = 0
    """In events that contradict themselves."""


class ForeignBlocks:
    """The names of one foreign engine."""

    __slots__ = ("_block_size", "_counters", "_hashes", "_model", "_name_nbytes", "_revision")

    def __init__(self, block_size: int, model: str, counters: EventCounters, *, revision: str = "") -> None:
        """``revision`` of the model: the engine's, if it names one."""
        self._block_size = block_size
        self._model = model
        self._revision = revision
        self._counters = counters
        self._hashes: dict[WireHash, BlockHash] = {}
        self._name_nbytes = _INT_OBJECT_NBYTES

    @property
    def nbytes(self) -> int:
        """170 to 200 bytes per block: table, name and hash."""
        if not self._hashes:
            return 0
        return sys.getsizeof(self._hashes) + len(self._hashes) * (self._name_nbytes + _HASH_OBJECT_NBYTES)

    def store(self, event: BlockStored) -> tuple[list[BlockHash], list[BlockHash]]:
        """Our hashes of the event's blocks, of which there is one at least; and hashes that are no longer
        held, because their name was given to another block."""
        names = event.block_hashes
        stride = self._block_size * TOKEN_NBYTES
        packed = pack_tokens(event.token_ids)
        if len(packed) != len(names) * stride:
            self._counters.malformed_blocks += len(names)
            return [], []
        parent = self._parent_hash(event)
        if parent is None:
            self._counters.orphaned_blocks += len(names)
            return [], []
        # The names of one engine are all of one kind.
        self._name_nbytes = max(self._name_nbytes, (sys.getsizeof(names[0]) + 15) & ~15)
        stored: list[BlockHash] = []
        lost: list[BlockHash] = []
        for i, name in enumerate(names):
            salt = salt_of(event, i)
            if salt is None or (salt and (i > 0 or event.parent_block_hash is not None)):
                self._counters.ignored_blocks += len(names) - i  # images and the like
                break
            parent = chain_hash(parent, packed[i * stride : (i + 1) * stride])
            before = self._hashes.get(name)
            if before is not None and before != parent:
                lost.append(before)
                stored = [block_hash for block_hash in stored if block_hash != before]
            self._hashes[name] = parent
            stored.append(parent)
        return stored, lost

    def remove(self, names: Iterable[WireHash]) -> list[BlockHash]:
        """Our hashes of those blocks whose names are known."""
        known = (self._hashes.pop(name, None) for name in names)
        return [block_hash for block_hash in known if block_hash is not None]

    def keep_if(self, wanted: Callable[[BlockHash], bool]) -> None:
        """Forget every other name; gives the room of all forgotten ones back."""
        self._hashes = {name: known for name, known in self._hashes.items() if wanted(known)}

    def compact(self, max_nbytes_per_entry: int, min_nbytes: int) -> None:
        """Rebuild the table if it holds the room of names long gone."""
        if sys.getsizeof(self._hashes) > min_nbytes + len(self._hashes) * max_nbytes_per_entry:
            self._hashes = dict(self._hashes)

    def _parent_hash(self, event: BlockStored) -> BlockHash | None:
        if event.parent_block_hash is not None:
            return self._hashes.get(event.parent_block_hash)
        # A first block with keys beyond its salt is ignored by the caller's loop, whatever its root.
        return root_hash(
            self._model,
            adapter=event.lora_name or "",
            salt=root_salt(event),
            revision=self._revision,
        )


def root_salt(event: BlockStored) -> str:
    """Of the sequence that the event begins: SGLang says it in a field of its own."""
    return event.cache_salt or salt_of(event, 0) or ""


def salt_of(event: BlockStored, i: int) -> str | None:
    """The salt among block ``i``'s extra keys: empty if none, None if there is more than we can hash."""
    if event.extra_keys is None:
        return ""
    keys = list(event.extra_keys[i] or ()) if i < len(event.extra_keys) else []
    if event.lora_name is not None and event.lora_name in keys:
        keys.remove(event.lora_name)
    match keys:
        case []:
            return ""
        case [str(salt)]:
            return salt
        case _:
            return None
