"""Which block of the pool holds which piece of which prefix, so that a prefix is computed once.

Cached blocks form one tree per salt; a node is a full block, its children are blocks that follow it:

    root(salt) ── block 7 ── block 3 ── block 9        tokens  0..16, 16..32, 32..48
                         └── block 5                   tokens  0..16, 16..32'

Invariants
- A cached block's parent is cached: when a block is evicted, what hangs on it goes with it. So every prefix
  of a cached prefix is cached, and events name parents that their readers know.
- Hashes only find candidates. A block is reused when its tokens and its parent *node* are the expected ones,
  so two prefixes with one hash can never be mistaken for each other.
- The pool holds the references and the order of eviction; this class adds names to blocks and takes none.

Sans-I/O. Does not know what is in a block: who inserts one vouches that its KV is complete.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from microserve.kvcache.block_pool import BlockPool
from microserve.kvcache.prefix.extension import extension
from microserve.kvcache.prefix.hash import (
    TOKEN_NBYTES,
    BlockHash,
    HashChain,
    block_hashes,
    pack_tokens,
    root_hash,
)
from microserve.kvcache.prefix.own_events import append_removed, stored_event
from microserve.kvcache.prefix.state import CachedStates
from microserve.protocol.bus.codec import decode_tokens
from microserve.protocol.errors import InternalError, InvalidInterval
from microserve.protocol.messages.kv.kv_events import AllBlocksCleared, BlockStored, KVEvent

_ROOT_BLOCK = -1


@dataclass(slots=True, eq=False)
class _Node:
    """One cached block, or the root of a salt."""

    block: int
    hash: BlockHash
    packed: bytes
    """The block's tokens as u32 LE; empty in a root."""
    salt: str
    parent: _Node | None
    children: dict[int, _Node] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CachedState:
    """What ``acquire_with_state`` has found."""

    blocks: list[int]
    state: list[int]
    """Blocks of the state behind them; empty with them."""
    num_matched: int
    """Blocks that match, be there a state or not."""


class PrefixCache:
    """Prefix reuse over one :class:`BlockPool`. At most one prefix cache per pool."""

    def __init__(self, pool: BlockPool, block_size: int, model: str, *, revision: str = "") -> None:
        """``block_size`` in tokens; ``revision`` of the model. Takes the pool's ``on_evict``."""
        HashChain(b"", block_size)  # refuses a block size below 1
        extension()  # built now if ever, and not by the first prompt
        self.block_size = block_size
        self.model = model
        self.revision = revision
        self.queries_tokens = 0
        """Tokens that ``acquire`` was asked for, and below: those that it found."""
        self.hit_tokens = 0
        self._pool = pool
        self._roots: dict[str, _Node] = {}
        self._by_hash: dict[BlockHash, _Node] = {}
        self._by_block: dict[int, _Node] = {}
        self._events: list[KVEvent] = []
        self.states = CachedStates(pool)
        """Of a hybrid model: without one behind it, a prefix is of no use to it."""
        pool.on_evict = self._on_evict

    @property
    def num_blocks(self) -> int:
        """Cached blocks, in use or free."""
        return len(self._by_block)

    @property
    def blocks(self) -> list[int]:
        """Their numbers in the pool."""
        return list(self._by_block)

    def new_chain(self, salt: str = "") -> HashChain:
        """The hash chain of a new sequence; keep it with the sequence and pass it to every call."""
        return HashChain(self._root_hash(salt), self.block_size)

    def match(
        self, tokens: Sequence[int], end: int, salt: str = "", chain: HashChain | None = None
    ) -> list[int]:
        """Blocks of the longest cached chain of full blocks in ``tokens[:end]``; all of them may match.

        Takes no references: share them before the pool is asked for anything else. ``chain`` is the
        sequence's own (``new_chain(salt)``) and is extended over all of ``tokens``; without it the hashes
        are computed and thrown away. Raises :class:`InvalidInterval` unless ``0 <= end <= len(tokens)``.
        """
        if not 0 <= end <= len(tokens):
            raise InvalidInterval(f"end is {end}, the prompt has {len(tokens)} tokens", field="end")
        root = self._roots.get(salt)
        if root is None:
            return []
        num_full = end // self.block_size
        candidates = []
        for block_hash in self._hashes(tokens, num_full, salt, chain)[:num_full]:
            node = self._by_hash.get(block_hash)
            if node is None:
                break
            candidates.append(node)
        packed = pack_tokens(tokens[: len(candidates) * self.block_size])
        stride = self.block_size * TOKEN_NBYTES
        blocks: list[int] = []
        parent = root
        for node in candidates:
            offset = len(blocks) * stride
            if node.parent is not parent or node.packed != packed[offset : offset + stride]:
                break
            blocks.append(node.block)
            parent = node
        return blocks

    def acquire(
        self, tokens: Sequence[int], end: int, salt: str = "", chain: HashChain | None = None
    ) -> list[int]:
        """``match`` with one reference taken on each block; counted in the statistics."""
        blocks = self.match(tokens, end, salt, chain)
        self._pool.share(blocks)
        self.queries_tokens += end
        self.hit_tokens += len(blocks) * self.block_size
        return blocks

    def acquire_with_state(self, tokens: Sequence[int], end: int, salt: str, chain: HashChain) -> CachedState:
        """As ``acquire``, of the longest match that a state stands behind; with a reference on its blocks
        too."""
        matched = self.match(tokens, end, salt, chain)
        blocks, state = matched, []
        while blocks and not (state := self.states.blocks_of(chain.hashes[len(blocks) - 1])):
            blocks = blocks[:-1]
        self._pool.share(blocks)
        self._pool.share(state)
        self.queries_tokens += end
        self.hit_tokens += len(blocks) * self.block_size
        return CachedState(blocks, state, len(matched))

    def insert(
        self,
        tokens: Sequence[int],
        blocks: Sequence[int],
        num_full: int,
        salt: str = "",
        start: int = 0,
        chain: HashChain | None = None,
    ) -> bool:
        """Make blocks ``start .. num_full - 1`` of a sequence findable; their KV must be complete.

        ``blocks[i]`` holds tokens ``[i * block_size, (i + 1) * block_size)``, for every ``i < num_full``,
        and the caller holds a reference on each. ``start`` is what the sequence has inserted before: with
        its ``chain`` (see ``match``) a call costs only the new blocks. A block whose content is cached
        already under another block stays as it is, and the sequence's later blocks hang on that other one.
        Returns whether all of it can be found now, or nothing was to be done. Raises :class:`InternalError`
        if the arguments do not fit each other.
        """
        if not 0 <= start <= num_full <= len(blocks) or num_full * self.block_size > len(tokens):
            raise InternalError(
                f"insert: blocks {start} to {num_full} of {len(blocks)} blocks and {len(tokens)} tokens"
            )
        if start == num_full:
            return True
        hashes = self._hashes(tokens, num_full, salt, chain)
        parent: _Node | None = None
        if start > 0:
            parent = self._by_block.get(blocks[start - 1])
            if parent is not None and parent.hash != hashes[start - 1]:
                raise InternalError(f"insert: block {parent.block} is cached with other tokens")
        if parent is None:
            # The start of a sequence; or the block before is known under another id, or was dropped with
            # an evicted parent: then the walk from the root finds it or puts it back.
            start = 0
            parent = self._roots.get(salt)
            if parent is None:
                parent = _Node(_ROOT_BLOCK, self._root_hash(salt), b"", salt, None)
        first = begin = start * self.block_size
        stride = self.block_size * TOKEN_NBYTES
        packed = pack_tokens(tokens[begin : num_full * self.block_size])
        stored: list[_Node] = []
        is_whole = True
        for i in range(start, num_full):
            offset = (i - start) * stride
            content = packed[offset : offset + stride]
            node = self._by_hash.get(hashes[i])
            if node is None:
                node = self._add(blocks[i], hashes[i], content, salt, parent)
                if not stored:
                    first = i * self.block_size
                stored.append(node)
            elif node.parent is parent and node.packed == content:
                self._emit_stored(stored, tokens[first : first + len(stored) * self.block_size])
                stored = []
            else:
                is_whole = False
                break  # two prefixes with one hash: the older keeps it
            parent = node
        self._emit_stored(stored, tokens[first : first + len(stored) * self.block_size])
        return is_whole

    def clear(self) -> None:
        """Forget every prefix. Blocks in use stay in use."""
        self.states.clear()
        for node in self._by_block.values():
            self._pool.unmark_cached(node.block)
            node.parent = None
        self._by_block.clear()
        self._by_hash.clear()
        self._roots.clear()
        # Whatever was not taken yet is void now.
        self._events = [AllBlocksCleared()]

    @property
    def has_events(self) -> bool:
        """Is there something for ``take_events``?"""
        return bool(self._events)

    def take_events(self) -> list[KVEvent]:
        """What has changed since the last call, in order. Call it every step: they pile up."""
        events, self._events = self._events, []
        return events

    def snapshot(self) -> list[BlockStored]:
        """Events that build the cache as it is now from nothing, parents before children.

        Includes what ``take_events`` has not handed out yet, so take those first."""
        events = []
        pending = [child for root in self._roots.values() for child in reversed(root.children.values())]
        while pending:
            run = [pending.pop()]
            while run[-1].children:
                first, *others = run[-1].children.values()
                pending += reversed(others)
                run.append(first)
            tokens = decode_tokens(b"".join(node.packed for node in run))
            events.append(self._stored_event(run, tokens))
        return events

    def check_integrity(self) -> None:
        """O(cached blocks). Raises :class:`InternalError` that says what is broken."""
        if len(self._by_hash) != len(self._by_block):
            raise InternalError(f"{len(self._by_hash)} hashes name {len(self._by_block)} blocks")
        for salt, root in self._roots.items():
            if not root.children:
                raise InternalError(f"the root of salt {salt!r} is kept, but has no blocks")
        reached = {node.block for root in self._roots.values() for node in self._below(root)}
        if reached != self._by_block.keys():
            raise InternalError(
                f"blocks {reached ^ self._by_block.keys()} are not both named and in the tree"
            )
        for block, node in self._by_block.items():
            parent = node.parent
            if parent is None or parent.children.get(block) is not node or node.block != block:
                raise InternalError(f"block {block} and its parent do not know each other")
            if self._by_hash.get(node.hash) is not node:
                raise InternalError(f"block {block} is not found under its hash")
            expected = block_hashes(decode_tokens(node.packed), self.block_size, parent.hash)
            if expected != [node.hash]:
                raise InternalError(f"block {block} has a hash that is not its content's")
        self.states.check_integrity()
        for block in range(self._pool.num_blocks):
            if self._pool.is_cached(block) != (block in self._by_block or self.states.has_block(block)):
                raise InternalError(f"block {block} is cached for only one of pool and prefix cache")

    def _root_hash(self, salt: str) -> BlockHash:
        return root_hash(self.model, salt=salt, revision=self.revision)

    def _hashes(
        self, tokens: Sequence[int], num_full: int, salt: str, chain: HashChain | None
    ) -> list[BlockHash]:
        """At least ``num_full`` hashes; the chain's own list, not a copy."""
        root = self._root_hash(salt)
        if chain is None:
            return block_hashes(tokens[: num_full * self.block_size], self.block_size, root)
        if chain.root != root or chain.block_size != self.block_size:
            raise InternalError("the hash chain is another sequence's: its salt or block size differs")
        chain.extend(tokens)
        return chain.hashes

    def _add(self, block: int, block_hash: BlockHash, packed: bytes, salt: str, parent: _Node) -> _Node:
        self._pool.mark_cached(block)
        node = _Node(block, block_hash, packed, salt, parent)
        parent.children[block] = node
        if parent.block == _ROOT_BLOCK:
            self._roots[salt] = parent
        self._by_hash[block_hash] = self._by_block[block] = node
        return node

    def _on_evict(self, block: int) -> None:
        """The pool has taken a cached block: drop it and everything that hangs on it."""
        if self.states.has_block(block):
            self.states.take(block)
            return
        evicted = self._by_block[block]
        parent = evicted.parent
        if parent is None:
            raise InternalError(f"block {block} has no parent")
        del parent.children[block]
        if not parent.children and parent.block == _ROOT_BLOCK:
            del self._roots[parent.salt]
        dropped = list(self._below(evicted))
        for node in dropped:
            self._pool.unmark_cached(node.block)
        dropped.append(evicted)
        for node in dropped:
            del self._by_block[node.block], self._by_hash[node.hash]
            self.states.drop(node.hash)
            node.parent = None
        append_removed(self._events, [node.hash for node in dropped])

    @staticmethod
    def _below(top: _Node) -> Iterator[_Node]:
        """Every node under ``top``."""
        pending = [*top.children.values()]
        while pending:
            node = pending.pop()
            yield node
            pending.extend(node.children.values())

    def _emit_stored(self, run: list[_Node], tokens: Sequence[int]) -> None:
        if run:
            self._events.append(self._stored_event(run, list(tokens)))

    def _stored_event(self, run: list[_Node], tokens: list[int]) -> BlockStored:
        """``run`` is a chain of consecutive nodes and ``tokens`` are theirs."""
        first = run[0]
        parent = first.parent
        if parent is None:
            raise InternalError(f"block {first.block} has no parent")
        above = None if parent.block == _ROOT_BLOCK else parent.hash
        return stored_event([node.hash for node in run], above, tokens, self.block_size, first.salt)
