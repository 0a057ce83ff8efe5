"""What a sequence's blocks mean: pool, prefix cache and grants under one roof.

Invariants, checked by ``check_integrity``:
  - a sequence holds one reference to each of its blocks, and only blocks below ``num_cached`` are shared;
  - a block enters the prefix cache only when its KV is complete and nobody else may still write to it:
    computed here, or received under a grant whose writers have all drained (WIRE.md 7);
  - no block of an exact engine's cache depends on KV of another numerics class (WIRE.md 4.5), and none of any
    engine's on KV that came by a codec that loses (WIRE.md 4.8);
  - blocks of an unsettled grant never go straight to the pool: the grant table closes them;
  - blocks that were put into a peer go back to the pool when its heap has read them, and no encoder reads
    them, not before.
"""

from __future__ import annotations

from microserve.kvcache.block_pool import BlockPool
from microserve.kvcache.grant.table import Expired, GrantEvent, GrantTable
from microserve.kvcache.grant.writer import LaneWriter
from microserve.kvcache.prefix.cache import PrefixCache
from microserve.kvcache.prefix.hash import HashChain
from microserve.protocol.errors import CacheFull, GrantsFull, MeshError, PromptTooLong
from microserve.protocol.messages.numerics import UNKNOWN, Numerics
from microserve.services.engine.core.request.received import Holder, ReceivedGrant, ReceivedGrants
from microserve.services.engine.core.request.sequence import Sequence, SequenceState, Transfer
from microserve.services.engine.core.request.state import States


class KvMemory:
    """The engine's KV blocks. Every call is made under the engine's lock."""

    def __init__(
        self, pool: BlockPool, cache: PrefixCache, grants: GrantTable, numerics: Numerics = UNKNOWN
    ) -> None:
        """``numerics``: in which class this engine computes."""
        self.numerics = numerics
        self.pool = pool
        self.cache = cache
        self.grants = grants
        self.block_size = cache.block_size
        num_state_blocks = grants.layout.num_state_blocks
        self.states = States(pool, cache, num_state_blocks) if num_state_blocks else None
        """Of a hybrid model's sequences."""
        self.received = ReceivedGrants()
        """Those of ``grants`` that are open or sealed, with their holders."""
        self._departing: list[tuple[Transfer, list[int]]] = []
        """Sends that have ended here, and the blocks that a stream or an encoder may still read for them."""

    def new_chain(self, salt: str) -> HashChain:
        return self.cache.new_chain(salt)

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    # --- local sequences ---------------------------------------------------------------------------

    def match(self, sequence: Sequence) -> None:
        """Start from what the prefix cache holds. The sequence has no blocks yet."""
        if self.states is not None:
            self.states.match(sequence)
        else:
            sequence.blocks = self.cache.acquire(
                sequence.token_ids, sequence.num_reusable, sequence.salt, sequence.chain
            )
        sequence.num_computed = sequence.num_cached = len(sequence.blocks) * self.block_size
        sequence.num_inserted = len(sequence.blocks)

    def missing_blocks(self, sequence: Sequence, num_tokens: int) -> int:
        missing = max(0, self.num_blocks_for(num_tokens) - len(sequence.blocks))
        return missing if self.states is None else missing + self.states.missing(sequence)

    def grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Give it blocks for ``num_tokens``; False (and nothing taken) if the pool has too few."""
        missing = self.missing_blocks(sequence, num_tokens)
        if missing == 0:
            return True
        if not self.pool.has(missing):
            return False
        if self.states is not None:
            missing -= self.states.missing(sequence)
            self.states.grow(sequence)
        sequence.blocks.extend(self.pool.allocate(missing))
        return True

    def advance(self, sequence: Sequence, end: int) -> None:
        """A step has computed its tokens below ``end``."""
        sequence.num_computed = end
        if self.states is not None:
            self.states.advance(sequence, self._granted_state(sequence.received))

    def insert(self, sequence: Sequence) -> None:
        """Offer its newly completed whole blocks to the prefix cache."""
        if sequence.received is not None:
            return  # its writers may not have drained
        if sequence.has_lossy_kv or (sequence.has_foreign_kv and self.numerics.is_exact):
            return  # whoever hit it would have other bits than its own class gives
        if self.states is not None:
            self.states.keep(sequence)
            return
        num_full = min(sequence.num_computed, sequence.num_tokens) // self.block_size
        if num_full <= sequence.num_inserted:
            return
        self.cache.insert(
            sequence.token_ids,
            sequence.blocks,
            num_full,
            sequence.salt,
            start=sequence.num_inserted,
            chain=sequence.chain,
        )
        sequence.num_inserted = num_full

    def release(self, sequence: Sequence, now: float) -> None:
        """Take all its blocks; those that a writer may still reach stay with the grant table, those that a
        stream may still read with ``free_drained``.

        A send that goes on later (preempted) waits for its stream: its next blocks may be these very ones,
        so they must be free when this returns, and its lane is not let go before its end.
        """
        blocks, states = sequence.blocks, self.states.take(sequence) if self.states is not None else []
        if sequence.received is not None:
            granted = sequence.received.grant_id
            num_granted = len(self.grants.block_table(granted))
            states = [each for each in states if each not in self.grants.state_table(granted)]
            self.close_grant(sequence.received, now)
            blocks = blocks[num_granted:]
        blocks = blocks + states if states else blocks
        if not self._depart(sequence, blocks):
            self.pool.free(blocks)
        sequence.blocks = []
        sequence.num_computed = sequence.num_cached = sequence.num_inserted = 0
        sequence.has_foreign_kv = sequence.has_lossy_kv = False

    def _depart(self, sequence: Sequence, blocks: list[int]) -> bool:
        """Whether the blocks of an ended send have to wait for its stream."""
        transfer = sequence.transfer
        if transfer is None or transfer.writer is None:
            return False
        if sequence.state is SequenceState.FINISHED:
            if _has_departed(transfer):
                return False
            self._departing.append((transfer, blocks))
            return True
        self._put_all(transfer, transfer.writer)
        if transfer.is_put and transfer.peer is not None:
            transfer.peer.leave_source()
            transfer.is_put = False
        return False

    def _put_all(self, transfer: Transfer, writer: LaneWriter) -> None:
        """Of a send that gives its blocks back and goes on later: what the encoder has still to read."""
        outgoing = transfer.outgoing
        if outgoing is None or outgoing.is_idle:
            return
        try:
            transfer.nbytes += outgoing.put_all(writer)
        except MeshError as error:
            outgoing.cancel()
            outgoing.wait_free()
            transfer.error = transfer.error or error

    @property
    def is_departing(self) -> bool:
        """Something that ended sends have put is still on its way."""
        return bool(self._departing)

    def free_drained(self) -> None:
        """Free the blocks of ended sends whose puts are done. After the peers' ``poll``."""
        if not self._departing:
            return
        waiting: list[tuple[Transfer, list[int]]] = []
        for transfer, blocks in self._departing:
            if _has_departed(transfer):
                self.pool.free(blocks)
            else:
                waiting.append((transfer, blocks))
        self._departing = waiting

    def goes_on(self, sequence: Sequence, end: int) -> bool:
        """Can it be computed on behind ``end`` tokens, whose KV is there? Not by a hybrid model whose state
        has seen all of them, where the last one's logits are wanted: they need the state before it."""
        return self.states is None or end < sequence.num_tokens or sequence.await_first

    # --- received KV -------------------------------------------------------------------------------

    def open_grant(
        self,
        holder: Holder,
        owner: bytes,
        request_id: str,
        token_ids: list[int],
        end: int,
        salt: str,
        now: float,
        *,
        may_lose: bool = False,
    ) -> ReceivedGrant:
        """Match ``token_ids[:end]``, allocate the rest and open a grant, which ``holder`` has from now on.
        ``may_lose``: its KV may come by a codec that loses.

        Of a hybrid model its state at ``end`` comes too, unless that is cached here. With a whole prompt it
        comes always: nobody but its sender has the logits of the last token.

        Raises :class:`CacheFull` for now, :class:`PromptTooLong` for ever. Grants that wait for their KV pin
        at most half of the pool: two engines whose pools were full of each other's grants could never compute
        what both wait for. With it a send of the same prompt fits any pool of the same size in the end.
        """
        num_state = self.states.num_blocks if self.states is not None else 0
        pinned, room = self.num_blocks_for(end) + num_state, self.pool.num_blocks // 2
        least = pinned + 1 + num_state  # a sender may go on from a cached state, and writes another one
        if least > room:
            raise PromptTooLong(
                f"receiving {end} tokens takes {least} blocks, at most {room} may wait for KV",
                field="end",
            )
        pending = self.received.num_pinned
        if pending + pinned > room:
            raise GrantsFull(f"{pending} blocks wait for KV already, {pinned} more asked", retry_after_s=0.1)
        matched_blocks, state = self._matched(token_ids, end, salt)
        matched = len(matched_blocks) * self.block_size
        missing = self.grants.layout.num_grant_blocks(matched, end)
        blocks: list[int] = []
        try:
            blocks = self.pool.allocate(missing)
            bounds = matched_blocks, matched, blocks, end, now
            grant = self.grants.open(request_id, owner.hex(), *bounds, may_lose=may_lose)
        except CacheFull:
            self.pool.free(blocks)
            self.pool.free(matched_blocks)
            self.pool.free(state)
            raise
        received = ReceivedGrant(
            *(grant, token_ids[:end], salt, holder, pinned), may_lose=may_lose, opened_at=now
        )
        received.state = state
        self.received.add(received)
        return received

    def _matched(self, token_ids: list[int], end: int, salt: str) -> tuple[list[int], list[int]]:
        """Blocks that the prefix cache has of ``token_ids[:end]``, and of its state at ``end`` if it has
        all."""
        if self.states is None:
            return self.cache.acquire(token_ids, end, salt), []
        if 0 < end < len(token_ids) and end % self.block_size == 0:
            cached = self.cache.acquire_with_state(token_ids, end, salt, self.new_chain(salt))
            if len(cached.blocks) * self.block_size == end:
                return cached.blocks, cached.state
            self.pool.free(cached.blocks)
            self.pool.free(cached.state)
        # Its state comes from elsewhere, with some KV at least.
        return self.cache.acquire(token_ids, max(0, end - 1), salt), []

    def close_grant(self, received: ReceivedGrant, now: float) -> None:
        """Nobody wants it any more: its blocks are freed, or quarantined while a writer may reach them."""
        self.received.forget(received)
        self.grants.close(received.grant_id, now)
        self._free_state(received)

    def _free_state(self, received: ReceivedGrant) -> None:
        self.pool.free(received.state)
        received.state = []

    def take(self, received: ReceivedGrant, numerics: str) -> None:
        """Somebody builds on the grant, whose KV comes in the class of that name."""
        grant = received.grant
        received.is_foreign = grant.matched < grant.end and numerics != self.numerics.name

    def adopt(self, sequence: Sequence, received: ReceivedGrant) -> None:
        """The sequence reads and extends the grant's blocks; their KV may still be on its way."""
        grant = received.grant
        sequence.has_foreign_kv = received.is_foreign
        self.grants.consume(grant.grant_id)
        sequence.blocks = self.grants.block_table(grant.grant_id)
        sequence.num_inserted = grant.matched // self.block_size
        sequence.num_cached = sequence.cached_tokens = grant.matched
        sequence.received_tokens = grant.end - grant.matched
        if self.states is not None:
            self.states.adopt(sequence, received.state or self.grants.state_table(grant.grant_id))
            received.state = []
        received.hand_to(sequence)

    def _granted_state(self, received: ReceivedGrant | None) -> list[int]:
        """Blocks of a hybrid model's state that its writers may still reach."""
        return self.grants.state_table(received.grant_id) if received is not None else []

    def settle(self, sequence: Sequence, received: ReceivedGrant) -> None:
        """The grant's blocks are the sequence's, and nobody else writes into them; a state that it has gone
        on from is of no more use."""
        self.received.forget(received)
        grant = received.grant
        own = grant.blocks[self.num_blocks_for(grant.end - grant.matched) :]
        if own != sequence.state_from:
            self.pool.free(own)

    def seal(self, received: ReceivedGrant) -> None:
        """All KV is in and verified; no new writer may start. The blocks settle when the last has drained."""
        received.num_pinned = 0
        received.is_lossy = self.grants.is_lossy(received.grant_id)
        if isinstance(received.holder, Sequence):
            received.holder.has_lossy_kv |= received.is_lossy
        self.grants.seal(received.grant_id)

    def poll(self, now: float) -> list[GrantEvent]:
        """What time and the writers have brought. A grant that has settled is in ``received`` until it is
        committed or forgotten there; one that has expired is out of it."""
        self.pool.look_for_memory()
        events = self.grants.poll(now)
        for event in events:
            if isinstance(event, Expired):
                received = self.received.get(event.grant_id)
                self.received.forget(received)
                self._free_state(received)
        return events

    def commit(self, received: ReceivedGrant, blocks: list[int]) -> int:
        """Make a settled grant's blocks prefix cache; the number of tokens that are cached now. An exact
        engine keeps none of another class, and none keeps lossy ones."""
        grant = received.grant
        first = grant.matched // self.block_size
        is_refused = received.is_lossy or (received.is_foreign and self.numerics.is_exact)
        num_full = first if is_refused else grant.end // self.block_size
        self.received.forget(received)
        if self.states is not None:
            return self._commit_with_state(received, blocks, is_refused=is_refused)
        self.cache.insert(received.token_ids, blocks, num_full, received.salt, start=first)
        self.pool.free(blocks)
        return num_full * self.block_size

    def _commit_with_state(self, received: ReceivedGrant, blocks: list[int], *, is_refused: bool) -> int:
        """Its state is of use at the grant's end alone: only whole blocks are cached with one."""
        grant = received.grant
        num_full = grant.end // self.block_size
        own = grant.blocks[len(blocks) - grant.matched // self.block_size :]
        is_kept = grant.end % self.block_size == 0 and not is_refused
        if own and is_kept:
            chain, first = self.new_chain(received.salt), grant.matched // self.block_size
            is_kept = self.cache.insert(received.token_ids, blocks, num_full, received.salt, first, chain)
            if is_kept and (name := chain.hashes[num_full - 1]) not in self.cache.states:
                self.cache.states.keep(name, own)
        self.pool.free(blocks)
        self.pool.free(own)
        self._free_state(received)
        return grant.end if is_kept else 0

    def check_integrity(self) -> None:
        self.pool.check_integrity()
        self.grants.check_integrity()
        self.received.check_integrity(self.grants.live_ids)


def _has_departed(transfer: Transfer) -> bool:
    """Nobody reads the blocks of an ended send any more."""
    is_drained = transfer.writer is None or transfer.writer.is_drained
    return is_drained and (transfer.outgoing is None or transfer.outgoing.is_free)
