"""Blocks in Python: where the native part cannot be had, and what it is compared with.

    generation   {block key: owners}       owners: int, bit e set when engine e holds the block

Owns two dicts and the memory of beginnings that many prompts share, for hashing is most of a lookup here.
What each method means is said in ``blocks.py``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from microserve.kvcache.prefix.blocks import Held
from microserve.kvcache.prefix.hash import BLOCK_HASH_NBYTES, BlockHash
from microserve.kvcache.prefix.owners import EVERY_ENGINE, OwnerSets
from microserve.kvcache.prefix.prompt import PromptHashes

# A key is the hash without its last byte: 15 bytes make a bytes object of 48, 16 would take 64. 120 bits
# are plenty where the worst of a collision is a request sent to the wrong engine.
_KEY_NBYTES = BLOCK_HASH_NBYTES - 1
_KEY_OBJECT_NBYTES = 48

# A dict takes 30 to 60 bytes per entry while it only grows, up to 120 after deletions. Above this it holds
# the room of entries long gone, which it never gives back by itself, and is rebuilt.
_MAX_TABLE_NBYTES_PER_ENTRY = 160
_MIN_TABLE_NBYTES = 4096


class PythonBlocks:
    """Two dicts, and the memory of beginnings that many prompts share: hashing is most of a lookup here."""

    def __init__(self, block_size: int, max_prompts_nbytes: int) -> None:
        self._block_size = block_size
        self._owners = OwnerSets()
        self._young: dict[bytes, int] = {}
        self._old: dict[bytes, int] = {}
        self._prompts = PromptHashes(block_size, max_prompts_nbytes)
        self._has_moved = False

    @property
    def num_blocks(self) -> int:
        return len(self._young) + len(self._old)

    @property
    def num_young(self) -> int:
        return len(self._young)

    @property
    def nbytes(self) -> int:
        """Tables as Python reports them, 48 per key, and prompts. 78 to 108 bytes per block while it grows (a
        table doubles at once), up to 168 after much coming and going."""
        return (
            sys.getsizeof(self._young)
            + sys.getsizeof(self._old)
            + self.num_blocks * _KEY_OBJECT_NBYTES
            + self._owners.nbytes
            + self._prompts.nbytes
        )

    @property
    def growth_nbytes(self) -> int:
        return sys.getsizeof(self._young) + self._owners.table_nbytes + self._prompts.max_nbytes

    def join(self, engine: int, engine_id: str) -> None:
        self._owners.join(1 << engine, engine_id)

    def store(self, engine: int, names: list[bytes]) -> int:
        young, old, bit = self._young, self._old, 1 << engine
        keys = [
            name[:_KEY_NBYTES] for name in names if isinstance(name, bytes) and len(name) == BLOCK_HASH_NBYTES
        ]
        if old and not old.keys().isdisjoint(keys):
            for key in keys:
                if owners := old.pop(key, 0):
                    young[key] = owners
        if young.keys().isdisjoint(keys):  # all are new, as most are; it asks for the memory of all at once
            for key in keys:
                young[key] = bit
            return len(names) - len(keys)
        for key in keys:
            owners = young.setdefault(key, bit)
            if not owners & bit:
                owners |= bit
                young[key] = self._owners.one(owners)
        if self._owners.is_full:
            self._prune_owners()
        return len(names) - len(keys)

    def remove(self, engine: int, names: list[bytes]) -> None:
        others = ~(1 << engine)
        for name in names:
            if not isinstance(name, bytes):
                continue
            key = name[:_KEY_NBYTES]
            generation = self._young if key in self._young else self._old
            owners = generation.get(key, 0) & others
            if owners:
                generation[key] = self._owners.one(owners)
            else:
                generation.pop(key, None)
        self._young = _compacted(self._young)
        self._old = _compacted(self._old)

    def forget(self, engine: int) -> None:
        """Rebuilding the maps gives their room back as well."""
        self._prune_owners()
        others = self._owners.without(1 << engine)
        self._young = {key: rest for key, owners in self._young.items() if (rest := others[owners])}
        self._old = {key: rest for key, owners in self._old.items() if (rest := others[owners])}

    def lookup(self, root: BlockHash, tokens: list[int]) -> dict[str, int]:
        return self._walk(root, tokens, None)

    def lookup_hashes(self, hashes: list[BlockHash]) -> dict[str, int]:
        return self._walk(b"", (), hashes)

    def age(self) -> int:
        num_forgotten = len(self._old)
        self._old, self._young = self._young, {}
        self._prune_owners()
        return num_forgotten

    def take_moved(self) -> bool:
        has_moved, self._has_moved = self._has_moved, False
        return has_moved

    def holds(self, block_hash: BlockHash) -> bool:
        key = block_hash[:_KEY_NBYTES]
        return key in self._young or key in self._old

    def generations(self) -> tuple[Held, Held]:
        return _held(self._young), _held(self._old)

    def _walk(
        self, before: BlockHash, tokens: Sequence[int], hashes: Sequence[BlockHash] | None
    ) -> dict[str, int]:
        """Along the runs of ``tokens`` behind ``before``, or along ``hashes``, until nobody holds a block."""
        prompts, young, old, size = self._prompts, self._young, self._old, self._block_size
        full = len(tokens) - len(tokens) % size if hashes is None else size * len(hashes)
        matched: dict[str, int] = {}
        owners, num_tokens, end = EVERY_ENGINE, 0, 0
        run: Sequence[BlockHash]
        while num_tokens == end < full:
            if hashes is None:
                end = min(full, num_tokens + min(num_tokens or size, prompts.max_run_tokens))
                name, run = prompts.run(before, tokens[num_tokens:end])
            else:
                end, run = full, hashes
            for block_hash in run:
                key = block_hash[:_KEY_NBYTES]
                holders = young.get(key)
                if holders is None:
                    holders = old.pop(key, 0)
                    if not holders:
                        break
                    young[key] = holders
                    self._has_moved = True
                if owners & holders != owners:
                    if not owners & holders:
                        break
                    matched = self._note(matched, owners & ~holders, num_tokens)
                    owners &= holders
                num_tokens += size
            else:
                if hashes is None:
                    prompts.remember(name, run)
                before = run[-1]
        return self._note(matched, owners, num_tokens)

    def _note(self, matched: dict[str, int], owners: int, num_tokens: int) -> dict[str, int]:
        """``matched`` with these engines, if there is something that they hold."""
        if not num_tokens:
            return matched
        named = dict.fromkeys(self._owners.names(owners), num_tokens)
        if not matched:
            return named
        matched.update(named)
        return matched

    def _prune_owners(self) -> None:
        """Sets of owners that no block has any more; O(blocks), so not before there can be that many."""
        self._owners.keep({*self._young.values(), *self._old.values()}, self.num_blocks)


def _held(generation: dict[bytes, int]) -> Held:
    for key, owners in generation.items():
        yield key, [engine for engine in range(owners.bit_length()) if owners >> engine & 1]


def _compacted(generation: dict[bytes, int]) -> dict[bytes, int]:
    limit = _MIN_TABLE_NBYTES + len(generation) * _MAX_TABLE_NBYTES_PER_ENTRY
    return dict(generation) if sys.getsizeof(generation) > limit else generation
