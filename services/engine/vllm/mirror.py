"""vLLM's prefix cache as its KV events tell it, under our hashes: what the shell publishes and snapshots.

    vLLM's name (a digest) ── tokens and parent ──> our chained hash      one mirrored block each

vLLM may evict a block before those that hang on it, and counts copies: a prefix that two requests computed at
the same time is there twice, and is gone with the second. So a block is *told* of while it is held at least
once and its parent is told of; the rest waits, and is told of again when the parent comes back. What is told
is exactly what vLLM would find.

Sans-I/O. Blocks whose hash depends on more than tokens, adapter and salt (images) are not mirrored: nobody
could ask for them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from microserve.kvcache.prefix.foreign import salt_of
from microserve.kvcache.prefix.hash import (
    TOKEN_NBYTES,
    BlockHash,
    block_hashes,
    chain_hash,
    pack_tokens,
    root_hash,
)
from microserve.kvcache.prefix.own_events import append_removed, stored_event
from microserve.protocol.bus.codec import decode_tokens
from microserve.protocol.messages.kv.kv_events import (
    DEVICE_MEDIUMS,
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KVEvent,
    KVEventBatch,
    WireHash,
)


@dataclass(slots=True, eq=False)
class _Block:
    name: WireHash
    hash: BlockHash
    parent: BlockHash | None
    """None: it is the first of a sequence."""
    packed: bytes
    salt: str
    adapter: str
    copies: int = 0
    is_told: bool = False
    children: dict[BlockHash, _Block] = field(default_factory=dict)
    """Those that are held; also while this one is not."""


class Mirror:
    def __init__(self, block_size: int, model: str, revision: str) -> None:
        self.counters: Counter[str] = Counter()
        self._block_size = block_size
        self._model = model
        self._revision = revision
        self._names: dict[WireHash, _Block] = {}
        self._orphans: dict[BlockHash, dict[BlockHash, _Block]] = {}
        """Held blocks by the hash of a parent that is not held."""
        self._by_hash: dict[BlockHash, _Block] = {}
        self._events: list[KVEvent] = []
        self._changes: list[tuple[list[_Block], list[BlockHash]]] = []
        """Of the batch that is read: blocks that are told of, or hashes of those that are gone."""
        self._fresh: set[_Block] = set()
        """Told of in this batch."""
        self._num_told = 0
        self._adapters: dict[str, int | None] = {}
        """Their numbers at vLLM."""

    @property
    def num_blocks(self) -> int:
        """Blocks that vLLM would find, each once."""
        return self._num_told

    @property
    def has_events(self) -> bool:
        return bool(self._events)

    def take_events(self) -> list[KVEvent]:
        """What has changed since the last call, in order."""
        events, self._events = self._events, []
        return events

    def take(self, batch: KVEventBatch) -> None:
        """A batch of vLLM's, the next one."""
        for event in batch.events:
            match event:
                case BlockStored():
                    if self._is_ours(event.medium, event.group_idx):
                        self._store(event)
                case BlockRemoved():
                    if self._is_ours(event.medium, event.group_idx):
                        for name in event.block_hashes:
                            self._remove(name)
                case AllBlocksCleared():
                    self._clear()
        for told, gone in self._changes:
            if told:
                self._events.append(self._stored(told))
            elif gone:
                append_removed(self._events, gone)
        self._changes.clear()
        self._fresh.clear()

    def holds(self, tokens: list[int], salt: str, adapter: str = "") -> bool:
        """Is the last of these whole blocks told of? True of none."""
        hashes = block_hashes(tokens, self._block_size, self._root(adapter, salt))
        block = self._by_hash.get(hashes[-1]) if hashes else None
        return not hashes or (block is not None and block.is_told)

    def snapshot(self) -> list[BlockStored]:
        """Events that build what is told of from nothing, parents before children. Take the events first."""
        events = []
        pending = [block for block in self._by_hash.values() if block.parent is None and block.is_told]
        while pending:
            run = [pending.pop()]
            while children := [child for child in run[-1].children.values() if child.is_told]:
                pending += children[1:]
                run.append(children[0])
            events.append(self._stored(run))
        return events

    # --- inside --------------------------------------------------------------------------------------

    @staticmethod
    def _is_ours(medium: str | None, group: int | None) -> bool:
        """On the device, and of the cache group that decides what a prefix is."""
        return medium in DEVICE_MEDIUMS and not group

    def _store(self, event: BlockStored) -> None:
        packed, stride = pack_tokens(event.token_ids), self._block_size * TOKEN_NBYTES
        names = event.block_hashes
        if event.block_size != self._block_size or len(packed) != len(names) * stride:
            self.counters["mirror_ignored_blocks"] += len(names)
            return
        parent: BlockHash | None = None
        if event.parent_block_hash is not None:
            before = self._names.get(event.parent_block_hash)
            if before is None:
                self.counters["mirror_orphaned_blocks"] += len(names)
                return
            parent = before.hash
        adapter = event.lora_name or ""
        if adapter:
            self._adapters[adapter] = event.lora_id
        run: list[_Block] = []
        for i, name in enumerate(names):
            salt = salt_of(event, i)
            if salt is None or (event.lora_id and not adapter):
                self.counters["mirror_ignored_blocks"] += len(names) - i
                break
            block = self._names.get(name)
            if block is None:
                content = packed[i * stride : (i + 1) * stride]
                above = parent or self._root(adapter, salt)
                block = self._add(_Block(name, chain_hash(above, content), parent, content, salt, adapter))
            block.copies += 1
            if not block.is_told and (parent is None or self._by_hash[parent].is_told):
                if run and (block.parent != run[-1].hash):
                    self._changes.append((run, []))
                    run = []
                run.append(block)
                self._set_told(block)
            parent = block.hash
        if run:
            self._changes.append((run, []))
            for block in [*run]:
                self._tell_below(block)

    def _root(self, adapter: str, salt: str) -> BlockHash:
        return root_hash(self._model, adapter=adapter, salt=salt, revision=self._revision)

    def _add(self, block: _Block) -> _Block:
        self._names[block.name] = self._by_hash[block.hash] = block
        block.children = self._orphans.pop(block.hash, {})
        if block.parent is not None:
            self._by_hash[block.parent].children[block.hash] = block
        return block

    def _remove(self, name: WireHash) -> None:
        block = self._names.get(name)
        if block is None:
            return
        block.copies -= 1
        if block.copies:
            return
        del self._names[name], self._by_hash[block.hash]
        parent = None if block.parent is None else self._by_hash.get(block.parent)
        if parent is not None:
            del parent.children[block.hash]
        elif block.parent is not None:
            orphans = self._orphans[block.parent]
            del orphans[block.hash]
            if not orphans:
                del self._orphans[block.parent]
        if block.children:
            self._orphans[block.hash] = block.children
        if block.is_told:
            lost = [each for each in self._below(block) if each.is_told]
            for each in (block, *lost):
                each.is_told = False
            self._num_told -= 1 + len(lost)
            gone = [each.hash for each in (*reversed(lost), block) if each not in self._fresh]
            if len(gone) <= len(lost):
                self._take_back(self._fresh.intersection((block, *lost)))
            self._changes.append(([], gone))

    def _clear(self) -> None:
        self._names.clear()
        self._by_hash.clear()
        self._orphans.clear()
        self._num_told = 0
        self._changes.clear()
        self._fresh.clear()
        self._events = [AllBlocksCleared()]

    def _take_back(self, blocks: set[_Block]) -> None:
        """They are gone in the batch that has told of them: of KV that did not come, say."""
        self._fresh -= blocks
        for told, _ in self._changes:
            told[:] = [each for each in told if each not in blocks]

    def _tell_below(self, top: _Block) -> None:
        """Blocks that have waited for this one."""
        for block in self._below(top):
            if not block.is_told:
                self._set_told(block)
                self._changes.append(([block], []))

    def _set_told(self, block: _Block) -> None:
        block.is_told = True
        self._fresh.add(block)
        self._num_told += 1

    @staticmethod
    def _below(top: _Block) -> Iterator[_Block]:
        """All that hangs on ``top``, parents first."""
        pending = [*top.children.values()]
        while pending:
            block = pending.pop()
            yield block
            pending.extend(block.children.values())

    def _stored(self, run: list[_Block]) -> BlockStored:
        first = run[0]
        tokens = decode_tokens(b"".join(block.packed for block in run))
        hashes = [block.hash for block in run]
        number = self._adapters.get(first.adapter)
        return stored_event(hashes, first.parent, tokens, self._block_size, first.salt, first.adapter, number)
