"""Which engine holds how long a prefix, learned from the KV events of many engines.

    generation   {block key: owners}       owners: int, bit e set when engine e holds the block
    young        stored or found by a lookup since this generation began
    old          not used since then; forgotten as a whole when room is needed

One hash names a whole prefix, so a flat map does what a tree would, without splits and merges.

A lookup walks the chain from its start and ANDs the owners; it does not search. Matched length is monotone
along a chain only while no engine loses a block before its successors, which no foreign engine promises. And
a search must hash the whole prompt first, which costs more than walking all of it does (60 % of a lookup,
benchmarks/index/prefix_index.py), while a walk stops hashing at the first block that nobody holds.

Owns the map and its limit in bytes. Sans-I/O; sequence numbers, gaps and snapshots are its caller's matter.
What it says is a hint: an engine decides by its own prefix cache.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from microserve.kvcache.prefix.foreign import EventCounters, ForeignBlocks, salt_of
from microserve.kvcache.prefix.hash import (
    BLOCK_HASH_NBYTES,
    BlockHash,
    chain_hash,
    pack_tokens,
    root_hash,
)
from microserve.kvcache.prefix.owners import EVERY_ENGINE, OwnerSets
from microserve.kvcache.prefix.prompt import PromptHashes
from microserve.protocol.errors import ConfigError, InternalError
from microserve.protocol.messages.kv_events import (
    DEVICE_MEDIUMS,
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KVEvent,
)

# A key is the hash without its last byte: 15 bytes make a bytes object of 48, 16 would take 64. 120 bits
# are plenty where the worst of a collision is a request sent to the wrong engine.
_KEY_NBYTES = BLOCK_HASH_NBYTES - 1
_KEY_OBJECT_NBYTES = 48

# A dict takes 30 to 60 bytes per entry while it only grows, up to 120 after deletions. Above this it holds
# the room of entries long gone, which it never gives back by itself, and is rebuilt.
_MAX_TABLE_NBYTES_PER_ENTRY = 160
_MIN_TABLE_NBYTES = 4096

_MAX_PROMPTS_NBYTES = 2 << 20
_CHECK_EVERY_BLOCKS = 1024
_MAX_NBYTES_PER_NEW_BLOCK = 512
"""Key, owners and both entries, where tables are still small and double more than once."""
MIN_MAX_NBYTES = 1 << 20
"""Below this, one check's worth of blocks would be a notable part of the limit."""


class _Engine:
    """One engine's place in the index."""

    __slots__ = ("bit", "engine_id", "foreign", "foreign_nbytes", "holds_blocks", "is_known_kind")

    def __init__(self, engine_id: str, bit: int) -> None:
        self.engine_id = engine_id
        self.bit = bit
        self.holds_blocks = False
        self.is_known_kind = False
        """Whether it is ours or foreign shows when its first block is stored."""
        self.foreign: ForeignBlocks | None = None
        self.foreign_nbytes = 0


class PrefixIndex:
    """Blocks of one revision of a model over many engines."""

    def __init__(self, block_size: int, model: str, max_nbytes: int, *, revision: str = "") -> None:
        """``block_size`` in tokens; ``max_nbytes`` as counted by ``nbytes``. Raises :class:`ConfigError`."""
        if block_size < 1:
            raise ConfigError(f"block_size is {block_size}, at least 1", field="block_size")
        if max_nbytes < MIN_MAX_NBYTES:
            raise ConfigError(f"max_nbytes is {max_nbytes}, at least {MIN_MAX_NBYTES}", field="max_nbytes")
        self.block_size = block_size
        self.model = model
        self.revision = revision
        self.max_nbytes = max_nbytes
        self.counters = EventCounters()
        self._engines: dict[str, _Engine] = {}
        self._owners = OwnerSets()
        self._young: dict[bytes, int] = {}
        self._old: dict[bytes, int] = {}
        self._foreign_nbytes = 0
        self._room_blocks = 0
        """So many may be stored before there can be anything to do for the limit."""
        self._root = root_hash(model, revision=revision)
        self._prompts = PromptHashes(block_size, min(max_nbytes // 16, _MAX_PROMPTS_NBYTES))

    @property
    def num_blocks(self) -> int:
        """Distinct blocks, each counted once however many engines hold it."""
        return len(self._young) + len(self._old)

    @property
    def num_engines(self) -> int:
        return len(self._engines)

    @property
    def nbytes(self) -> int:
        """Bytes of the maps and their objects: tables as Python reports them, 48 per key, and the names of
        foreign engines. 78 to 108 bytes per block while it grows (a table doubles at once), up to 168 after
        much coming and going; 170 to 230 more per block of each foreign engine."""
        return (
            sys.getsizeof(self._young)
            + sys.getsizeof(self._old)
            + self.num_blocks * _KEY_OBJECT_NBYTES
            + self._owners.nbytes
            + self._foreign_nbytes
            + self._prompts.nbytes
        )

    def apply(self, engine_id: str, events: Iterable[KVEvent]) -> None:
        """Take in an engine's events, in the order it sent them. An unknown engine becomes known.

        Holding a block is a fact, not a count: stored twice and removed once is removed. Never raises for
        what ``decode_batch`` has let through; what cannot be used is counted in ``counters``."""
        engine = self._engines.get(engine_id) or self._join(engine_id)
        removed = False
        for event in events:
            if isinstance(event, BlockStored):
                self._store_event(engine, event)
                self._room_blocks -= len(event.block_hashes)
                if self._room_blocks < 0:
                    self._keep_to_limit(engine)
            elif isinstance(event, BlockRemoved):
                self._remove_event(engine, event)
                removed = True
            elif isinstance(event, AllBlocksCleared):
                self._forget_blocks(engine)
        if removed:
            self._compact(engine)
        if engine.foreign is not None:
            self._keep_to_limit(engine)

    def replace(self, engine_id: str, events: Iterable[KVEvent]) -> None:
        """A snapshot: what the engine held before is forgotten; nobody sees a state between."""
        engine = self._engines.get(engine_id)
        if engine is not None:
            self._forget_blocks(engine)
            engine.is_known_kind = False  # a restart may have changed what runs there
        self.apply(engine_id, events)

    def remove_engine(self, engine_id: str) -> None:
        """Forget an engine and all that it held; unknown ids are fine."""
        engine = self._engines.pop(engine_id, None)
        if engine is not None:
            self._forget_blocks(engine)
            self._owners.leave(engine.bit)

    def lookup(self, tokens: Sequence[int], salt: str = "", *, adapter: str = "") -> dict[str, int]:
        """Engine id -> tokens of the prompt that it holds from the start: whole blocks, without a gap.

        Engines that hold none are left out. Raises :class:`InvalidRequest` for a token that is not a u32.
        """
        root = self._root
        if salt or adapter:
            root = root_hash(self.model, adapter=adapter, salt=salt, revision=self.revision)
        return self._walk(root, tokens, None)

    def lookup_hashes(self, hashes: Sequence[BlockHash]) -> dict[str, int]:
        """``lookup`` for a caller who has the prompt's hashes."""
        return self._walk(b"", (), hashes)

    def _walk(
        self, before: BlockHash, tokens: Sequence[int], hashes: Sequence[BlockHash] | None
    ) -> dict[str, int]:
        """Along the runs of ``tokens`` behind ``before``, or along ``hashes``, until nobody holds a block."""
        prompts, young, old, size = self._prompts, self._young, self._old, self.block_size
        full = len(tokens) - len(tokens) % size if hashes is None else size * len(hashes)
        matched: dict[str, int] = {}
        owners, num_tokens, end = EVERY_ENGINE, 0, 0
        moved = False
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
                    moved = True
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
        if moved:
            self._keep_to_limit(None)
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

    def check_integrity(self) -> None:
        """O(blocks). Raises :class:`InternalError` that says what is broken."""
        live = sum(self._owners.ids)
        if {engine.bit: engine.engine_id for engine in self._engines.values()} != self._owners.ids:
            raise InternalError("engines and bits do not name each other")
        if self._young.keys() & self._old.keys():
            raise InternalError("a block is in both generations")
        for generation in (self._young, self._old):
            for key, owners in generation.items():
                if not owners or owners & ~live or len(key) != _KEY_NBYTES:
                    raise InternalError(f"block {key.hex()} is held by {owners:#x} of engines {live:#x}")
        foreign = [engine.foreign for engine in self._engines.values() if engine.foreign is not None]
        if self._foreign_nbytes != sum(blocks.nbytes for blocks in foreign):
            raise InternalError("bytes of the foreign names do not add up")
        if self.nbytes > self.max_nbytes:
            raise InternalError(f"{self.nbytes} bytes, limit {self.max_nbytes}")

    # --- one event ---------------------------------------------------------------------------------

    def _store_event(self, engine: _Engine, event: BlockStored) -> None:
        names = event.block_hashes
        if not names:
            return
        if (
            event.block_size != self.block_size
            or event.medium not in DEVICE_MEDIUMS
            or event.group_idx
            or (event.lora_id and event.lora_name is None)
        ):
            self.counters.ignored_blocks += len(names)
            return
        if not engine.is_known_kind:
            engine.is_known_kind = True
            is_ours = self._is_our_hash(event)
            engine.foreign = None if is_ours else self._new_foreign()
        if engine.foreign is None:
            keys = [
                name[:_KEY_NBYTES]
                for name in names
                if isinstance(name, bytes) and len(name) == BLOCK_HASH_NBYTES
            ]
            self.counters.malformed_blocks += len(names) - len(keys)
        else:
            hashes, lost = engine.foreign.store(event)
            self._remove(engine, lost)
            keys = [block_hash[:_KEY_NBYTES] for block_hash in hashes]
        self._store(engine, keys)

    def _is_our_hash(self, event: BlockStored) -> bool:
        """Others may use 16 bytes as well, so the first block that an engine stores is recomputed."""
        name, parent = event.block_hashes[0], event.parent_block_hash
        if parent is None:
            parent = root_hash(
                self.model,
                adapter=event.lora_name or "",
                salt=salt_of(event, 0) or "",
                revision=self.revision,
            )
        packed = pack_tokens(event.token_ids[: self.block_size])
        return isinstance(parent, bytes) and name == chain_hash(parent, packed)

    def _new_foreign(self) -> ForeignBlocks:
        return ForeignBlocks(self.block_size, self.model, self.counters, revision=self.revision)

    def _store(self, engine: _Engine, keys: Sequence[bytes]) -> None:
        """The hot loop."""
        young, old, bit = self._young, self._old, engine.bit
        engine.holds_blocks = True
        if old and not old.keys().isdisjoint(keys):
            for key in keys:
                if owners := old.pop(key, 0):
                    young[key] = owners
        if young.keys().isdisjoint(keys):  # all are new, as most are; it asks for the memory of all at once
            for key in keys:
                young[key] = bit
            return
        for key in keys:
            owners = young.setdefault(key, bit)
            if not owners & bit:
                owners |= bit
                young[key] = self._owners.one(owners)

    def _remove_event(self, engine: _Engine, event: BlockRemoved) -> None:
        # What leaves an offload tier or a secondary group was never stored here.
        if event.medium not in DEVICE_MEDIUMS or event.group_idx:
            return
        if engine.foreign is None:
            self._remove(engine, [name for name in event.block_hashes if isinstance(name, bytes)])
        else:
            self._remove(engine, engine.foreign.remove(event.block_hashes))

    def _remove(self, engine: _Engine, hashes: Sequence[BlockHash]) -> None:
        others = ~engine.bit
        for block_hash in hashes:
            key = block_hash[:_KEY_NBYTES]
            generation = self._young if key in self._young else self._old
            owners = generation.get(key, 0) & others
            if owners:
                generation[key] = self._owners.one(owners)
            else:
                generation.pop(key, None)

    # --- engines -----------------------------------------------------------------------------------

    def _join(self, engine_id: str) -> _Engine:
        engine = self._engines[engine_id] = _Engine(engine_id, self._owners.join(engine_id))
        return engine

    def _forget_blocks(self, engine: _Engine) -> None:
        """Take the engine's bit out of every entry; rebuilding the maps gives their room back as well.

        O(blocks in the index), once per engine that dies or is replaced: a set of blocks for each engine
        instead would double the memory."""
        if engine.holds_blocks:
            engine.holds_blocks = False
            self._prune_owners()
            others = self._owners.without(engine.bit)
            self._young = {key: rest for key, owners in self._young.items() if (rest := others[owners])}
            self._old = {key: rest for key, owners in self._old.items() if (rest := others[owners])}
        if engine.foreign is not None:
            engine.foreign = self._new_foreign()
        self._measure_foreign(engine)

    # --- bytes -------------------------------------------------------------------------------------

    def _keep_to_limit(self, changed: _Engine | None) -> None:
        """Afterwards ``nbytes <= max_nbytes``. Forgets a generation at a time, so between a third and the
        whole of the limit is in use: an order of use kept per entry would cost more memory than that."""
        if changed is not None and changed.foreign is not None:
            self._measure_foreign(changed)
        if self._owners.is_full:
            self._prune_owners()
        while self._needs_room():
            self.counters.evicted_blocks += len(self._old)
            self._old, self._young = self._young, {}
            self._prune_owners()
            for engine in self._engines.values():
                if engine.foreign is not None:
                    engine.foreign.keep_if(lambda block_hash: block_hash[:_KEY_NBYTES] in self._old)
                    self._measure_foreign(engine)
        # A table doubles at once.
        tables = sys.getsizeof(self._young) + self._owners.table_nbytes
        spare = self.max_nbytes // 2 - self.nbytes - tables - self._prompts.max_nbytes
        self._room_blocks = min(_CHECK_EVERY_BLOCKS, spare // _MAX_NBYTES_PER_NEW_BLOCK)

    def _needs_room(self) -> bool:
        """Over the limit; or the young generation alone takes half of it, so that a new one should begin."""
        nbytes = self.nbytes
        return nbytes > self.max_nbytes or (nbytes * len(self._young) * 2 > self.max_nbytes * self.num_blocks)

    def _prune_owners(self) -> None:
        """Sets of owners that no block has any more; O(blocks), so not before there can be that many."""
        self._owners.keep({*self._young.values(), *self._old.values()}, self.num_blocks)

    def _compact(self, engine: _Engine) -> None:
        self._young = _compacted(self._young)
        self._old = _compacted(self._old)
        if engine.foreign is not None:
            engine.foreign.compact(_MAX_TABLE_NBYTES_PER_ENTRY, _MIN_TABLE_NBYTES)

    def _measure_foreign(self, engine: _Engine) -> None:
        nbytes = 0 if engine.foreign is None else engine.foreign.nbytes
        self._foreign_nbytes += nbytes - engine.foreign_nbytes
        engine.foreign_nbytes = nbytes


def _compacted(generation: dict[bytes, int]) -> dict[bytes, int]:
    limit = _MIN_TABLE_NBYTES + len(generation) * _MAX_TABLE_NBYTES_PER_ENTRY
    return dict(generation) if sys.getsizeof(generation) > limit else generation
