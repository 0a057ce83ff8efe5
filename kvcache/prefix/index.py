"""Which engine holds how long a prefix, learned from the KV events of many engines.

Owns what events mean, which engines there are, and the limit in bytes; ``blocks.py`` has the map and the
lookup, which are native where they can be. Sans-I/O; sequence numbers, gaps and snapshots are its caller's
matter. What it says is a hint: an engine decides by its own prefix cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import count
from typing import cast

from microserve.kvcache.prefix.blocks import Blocks
from microserve.kvcache.prefix.extension import extension
from microserve.kvcache.prefix.foreign import EventCounters, ForeignBlocks, root_salt
from microserve.kvcache.prefix.hash import (
    BLOCK_HASH_NBYTES,
    BlockHash,
    chain_hash,
    not_tokens,
    pack_tokens,
    root_hash,
)
from microserve.kvcache.prefix.python_blocks import PythonBlocks
from microserve.protocol.errors import ConfigError, InternalError
from microserve.protocol.messages.kv.kv_events import (
    DEVICE_MEDIUMS,
    PREFIX_KINDS,
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KVEvent,
)

# A dict of names holds the room of entries long gone above this many bytes an entry, and is rebuilt.
_MAX_TABLE_NBYTES_PER_ENTRY = 160
_MIN_TABLE_NBYTES = 4096

_MAX_GROUPS = 64
_MAX_PROMPTS_NBYTES = 2 << 20
_CHECK_EVERY_BLOCKS = 1024
_MAX_NBYTES_PER_NEW_BLOCK = 512
"""Key, owners and both entries, where tables are still small and grow more than once."""
MIN_MAX_NBYTES = 1 << 20
"""Below this, one check's worth of blocks would be a notable part of the limit."""


class _Engine:
    """One engine's place in the index."""

    __slots__ = ("foreign", "foreign_nbytes", "groups", "holds_blocks", "is_known_kind", "number")

    def __init__(self, number: int) -> None:
        self.number = number
        self.holds_blocks = False
        self.is_known_kind = False
        """Whether it is ours or foreign shows when its first block is stored."""
        self.foreign: ForeignBlocks | None = None
        self.foreign_nbytes = 0
        self.groups: dict[int, bool] = {}
        """Of cache groups whose kind was said: whether they keep whole prefixes. Removals do not say it."""

    def is_prefix(self, event: BlockStored | BlockRemoved) -> bool:
        """Whether it is about blocks of whole prefixes, on this engine's own device."""
        group = event.group_idx or 0
        kind = event.kv_cache_spec_kind if isinstance(event, BlockStored) else None
        if kind not in (None, "unknown") and (group in self.groups or len(self.groups) < _MAX_GROUPS):
            self.groups[group] = kind in PREFIX_KINDS
        is_here = event.medium in DEVICE_MEDIUMS and event.locality in (None, "LOCAL")
        return is_here and self.groups.get(group, group == 0)


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
        self._foreign_nbytes = 0
        self._room_blocks = 0
        """So many may be stored before there can be anything to do for the limit."""
        self._root = root_hash(model, revision=revision)
        self._blocks = _new_blocks(block_size, min(max_nbytes // 16, _MAX_PROMPTS_NBYTES))
        self._has_old = False
        """Of the two generations; none before there was too much."""

    @property
    def num_blocks(self) -> int:
        """Distinct blocks, each counted once however many engines hold it."""
        return self._blocks.num_blocks

    @property
    def num_engines(self) -> int:
        return len(self._engines)

    @property
    def nbytes(self) -> int:
        """Bytes of the map and its objects, and the names of foreign engines. A native block takes 32 to 50
        on up to 64 engines (11 to 17 more for each 64 further ones), one in Python 78 to 168; 170 to 230 more
        per block of each foreign engine."""
        return self._blocks.nbytes + self._foreign_nbytes

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
        if engine.foreign is not None:
            if removed:
                engine.foreign.compact(_MAX_TABLE_NBYTES_PER_ENTRY, _MIN_TABLE_NBYTES)
            self._keep_to_limit(engine)

    def replace(self, engine_id: str, events: Iterable[KVEvent]) -> None:
        """A snapshot: what the engine held before is forgotten; nobody sees a state between."""
        engine = self._engines.get(engine_id)
        if engine is not None:
            self._forget_blocks(engine)
            engine.is_known_kind = False  # a restart may have changed what runs there
            engine.groups.clear()
        self.apply(engine_id, events)

    def remove_engine(self, engine_id: str) -> None:
        """Forget an engine and all that it held; unknown ids are fine."""
        engine = self._engines.pop(engine_id, None)
        if engine is not None:
            self._forget_blocks(engine)

    def lookup(self, tokens: Sequence[int], salt: str = "", *, adapter: str = "") -> dict[str, int]:
        """Engine id -> tokens of the prompt that it holds from the start: whole blocks, without a gap.

        Engines that hold none are left out. Raises :class:`InvalidRequest` for a token that is not a u32.
        """
        root = self._root
        if salt or adapter:
            root = root_hash(self.model, adapter=adapter, salt=salt, revision=self.revision)
        try:
            matched = self._blocks.lookup(root, tokens if type(tokens) is list else list(tokens))
        except (OverflowError, TypeError):
            raise not_tokens() from None
        if self._has_old and self._blocks.take_moved():
            self._keep_to_limit(None)
        return matched

    def lookup_hashes(self, hashes: Sequence[BlockHash]) -> dict[str, int]:
        """``lookup`` for a caller who has the prompt's hashes."""
        matched = self._blocks.lookup_hashes(hashes if type(hashes) is list else list(hashes))
        if self._has_old and self._blocks.take_moved():
            self._keep_to_limit(None)
        return matched

    def check_integrity(self) -> None:
        """O(blocks). Raises :class:`InternalError` that says what is broken."""
        live = {engine.number for engine in self._engines.values()}
        if len(live) != len(self._engines):
            raise InternalError("two engines have one number")
        young, old = map(dict, self._blocks.generations())
        if young.keys() & old.keys():
            raise InternalError("a block is in both generations")
        if (self.num_blocks, self._blocks.num_young) != (len(young) + len(old), len(young)):
            raise InternalError(f"{self.num_blocks} blocks, but {len(young)} and {len(old)}")
        for key, owners in (young | old).items():
            if not owners or not live.issuperset(owners) or len(key) < BLOCK_HASH_NBYTES - 1:
                raise InternalError(f"block {key.hex()} is held by {owners} of engines {live}")
            if not self._blocks.holds(key.ljust(BLOCK_HASH_NBYTES, b"\0")):
                raise InternalError(f"block {key.hex()} is there, and is not found")
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
            or not engine.is_prefix(event)
            or (event.lora_id and event.lora_name is None)
        ):
            self.counters.ignored_blocks += len(names)
            return
        if not engine.is_known_kind:
            engine.is_known_kind = True
            is_ours = self._is_our_hash(event)
            engine.foreign = None if is_ours else self._new_foreign()
        engine.holds_blocks = True
        if engine.foreign is None:
            # What is no hash is left out there, whatever its type.
            self.counters.malformed_blocks += self._blocks.store(engine.number, cast("list[bytes]", names))
            return
        hashes, lost = engine.foreign.store(event)
        if lost:
            self._blocks.remove(engine.number, lost)
        self._blocks.store(engine.number, hashes)

    def _is_our_hash(self, event: BlockStored) -> bool:
        """Others may use 16 bytes as well, so the first block that an engine stores is recomputed."""
        name, parent = event.block_hashes[0], event.parent_block_hash
        if parent is None:
            parent = root_hash(
                self.model,
                adapter=event.lora_name or "",
                salt=root_salt(event),
                revision=self.revision,
            )
        packed = pack_tokens(event.token_ids[: self.block_size])
        return isinstance(parent, bytes) and name == chain_hash(parent, packed)

    def _new_foreign(self) -> ForeignBlocks:
        return ForeignBlocks(self.block_size, self.model, self.counters, revision=self.revision)

    def _remove_event(self, engine: _Engine, event: BlockRemoved) -> None:
        if not engine.is_prefix(event):  # then it was never stored here
            return
        names = event.block_hashes
        hashes = cast("list[bytes]", names) if engine.foreign is None else engine.foreign.remove(names)
        self._blocks.remove(engine.number, hashes)

    # --- engines -----------------------------------------------------------------------------------

    def _join(self, engine_id: str) -> _Engine:
        taken = {engine.number for engine in self._engines.values()}
        number = next(each for each in count() if each not in taken)
        self._blocks.join(number, engine_id)
        engine = self._engines[engine_id] = _Engine(number)
        return engine

    def _forget_blocks(self, engine: _Engine) -> None:
        if engine.holds_blocks:
            engine.holds_blocks = False
            self._blocks.forget(engine.number)
        if engine.foreign is not None:
            engine.foreign = self._new_foreign()
        self._measure_foreign(engine)

    # --- bytes -------------------------------------------------------------------------------------

    def _keep_to_limit(self, changed: _Engine | None) -> None:
        """Afterwards ``nbytes <= max_nbytes``. Forgets a generation at a time, so between a third and the
        whole of the limit is in use: an order of use kept per entry would cost more memory than that."""
        if changed is not None and changed.foreign is not None:
            self._measure_foreign(changed)
        while self._needs_room():
            self.counters.evicted_blocks += self._blocks.age()
            self._has_old = True
            for engine in self._engines.values():
                if engine.foreign is not None:
                    engine.foreign.keep_if(self._blocks.holds)
                    self._measure_foreign(engine)
        spare = self.max_nbytes // 2 - self.nbytes - self._blocks.growth_nbytes
        self._room_blocks = min(_CHECK_EVERY_BLOCKS, spare // _MAX_NBYTES_PER_NEW_BLOCK)

    def _needs_room(self) -> bool:
        """Over the limit; or the young generation alone takes half of it, so that a new one should begin."""
        nbytes, blocks = self.nbytes, self._blocks
        return nbytes > self.max_nbytes or (
            nbytes * blocks.num_young * 2 > self.max_nbytes * blocks.num_blocks
        )

    def _measure_foreign(self, engine: _Engine) -> None:
        nbytes = 0 if engine.foreign is None else engine.foreign.nbytes
        self._foreign_nbytes += nbytes - engine.foreign_nbytes
        engine.foreign_nbytes = nbytes


def _new_blocks(block_size: int, max_prompts_nbytes: int) -> Blocks:
    native = extension()
    return PythonBlocks(block_size, max_prompts_nbytes) if native is None else native.NativeBlocks(block_size)
