"""Grants from the sender's side: which rows go where, and the lane through which they are written.

    writer                                   receiver (table.py)
    hold the lane
    STATE is (generation, OPEN)?  ──no──> let go, nothing written
    WRITER BEGIN END CLAIM
    per layer: STATE?, put, tags, arrival    frontier, verify, use
    FIRST_TOKEN                              seal or close: CLOSED, then: who holds a lane?
    let go                                   nobody: the blocks are safe

STATE is read before each layer so that a closed grant costs at most one layer of useless writing; that
nothing is written into blocks in use rests on holding the lane alone (heap.py). A writer that dies in the
middle lets go by dying; one that freezes holds on, and its blocks wait in quarantine.

An encoded lane may bring payloads of a codec instead of rows. Two writers of the same rows do each other no
harm, but a payload over rows that another lane has brought does. So no lane brings any of an encoded one's
tokens: the receiver takes nothing where that is so (arrival.py), and a writer that finds it after its claim
gives up before it puts anything. Of a lane that the receiver took something from and the claim of an encoded
one, one comes first: either the receiver saw the claim, or the writer sees the lane.

Owns the plan and the order of one lane's writes. Does not know models, sockets, or when KV is computed.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from microserve.kvcache.grant.checksum import extend_by_payload, extend_checksum
from microserve.kvcache.grant.payload import payload_copies, payload_spans
from microserve.kvcache.heap.heap import Copies, Copy, Heap, PeerHeap
from microserve.kvcache.layout import KvLayout, block_spans
from microserve.kvcache.words import (
    CHECKSUMMED,
    CLAIMED,
    ENCODED,
    OPEN,
    POISON,
    count_of,
    grant_tag,
    pack_count,
    pack_state,
    payload_tag,
)
from microserve.protocol.errors import InternalError, InvalidInterval, InvalidRequest, TransferFailed
from microserve.protocol.messages.kv.grant import MAX_LANES, Grant

_FENCE = threading.Lock()
"""Taking it orders a store of this process before its later loads: no other thing here does."""


class TransferPlan:
    """Which bytes of which blocks carry tokens ``[begin, end)`` into a grant's blocks."""

    def __init__(self, source: KvLayout, target: KvLayout, grant: Grant, begin: int, end: int) -> None:
        """``begin`` moves up to the grant's ``matched``: the receiver has what lies before.

        :class:`InvalidInterval` for bounds outside the grant, :class:`InvalidRequest` for a grant that
        contradicts itself or ``target``, :class:`TransferFailed` for KV that is laid out differently.
        """
        for theirs in (grant.layout_hash, target.layout_hash):
            if theirs != source.layout_hash:
                raise TransferFailed(f"KV is laid out differently: {source.layout_hash} and {theirs}")
        if grant.block_size != source.block_size:
            raise TransferFailed(f"blocks of {source.block_size} tokens here, {grant.block_size} there")
        _check_blocks(grant, target)
        if not 0 <= begin <= end <= grant.end:
            raise InvalidInterval(
                f"[{begin}, {end}) is not within the grant's [0, {grant.end})",
                field="end" if 0 <= begin <= end else "begin",
            )
        if not source.has_rows:
            _check_whole_blocks(source, grant, begin, end)
        self.begin = min(max(begin, grant.matched), end)
        self.end = end
        self.is_whole = not source.has_rows
        """Blocks are put whole only."""
        self._source = source
        self._grant = grant

    def copies(
        self, source_blocks: Sequence[int], lo: int, hi: int, state_blocks: Sequence[int] = ()
    ) -> Copies:
        """Layer 0 of tokens ``[lo, hi)``, within ``[begin, end)``; other layers are shifted by whole layers.

        ``source_blocks`` is the block table of tokens ``[0, hi)`` in the sender's pool. Where blocks have
        no rows, what lies behind ``hi`` in its block goes along. ``state_blocks`` hold a hybrid model's
        state at the grant's end: they go with what ends there.
        """
        source = self._source
        needed = source_blocks[lo // source.block_size : source.num_blocks_for(hi)]
        if (
            not self.begin <= lo <= hi <= self.end
            or len(source_blocks) < source.num_blocks_for(hi)
            or any(not 0 <= block < source.num_blocks for block in needed)
        ):
            raise InternalError(
                f"copies: [{lo}, {hi}) of [{self.begin}, {self.end}) from {len(source_blocks)} blocks "
                f"of a pool of {source.num_blocks}"
            )

        block_nbytes, row_nbytes = source.block_nbytes, source.row_nbytes
        copies = []
        for (block, row, num_rows), (target_block, _, _) in zip(
            block_spans(source_blocks, 0, lo, hi, source.block_size), self.target_spans(lo, hi), strict=True
        ):
            # Row for row: both tables start at a multiple of the block size.
            start, target_start = block * block_nbytes, target_block * block_nbytes
            if num_rows == source.block_size or not source.has_rows:
                copies.append(Copy(start, target_start, block_nbytes))
                continue
            for half in (0, source.half_nbytes):
                at = half + row * row_nbytes
                copies.append(Copy(start + at, target_start + at, num_rows * row_nbytes))
        if hi == self._grant.end and source.num_state_blocks:
            if len(state_blocks) != source.num_state_blocks:
                raise InternalError(f"copies: a state of {len(state_blocks)} blocks")
            for block, target_block in zip(state_blocks, self.state_blocks, strict=True):
                copies.append(Copy(block * block_nbytes, target_block * block_nbytes, block_nbytes))
        return Copies(copies)

    @property
    def state_blocks(self) -> list[int]:
        """The grant's blocks for a hybrid model's state; empty of other models."""
        return self._grant.blocks[self._source.num_blocks_for(self._grant.end - self._grant.matched) :]

    def cut(self, lo: int, hi: int) -> tuple[int, int]:
        """The part of ``[lo, hi)`` that can be put now: within ``[begin, end)``, and where blocks are put
        whole without one that is not whole yet. Empty is ``lo == hi``."""
        lo, hi = max(lo, self.begin), min(hi, self.end)
        if lo < hi and self.is_whole:
            size = self._source.block_size
            lo, hi = lo // size * size, hi if hi == self.end else hi // size * size
        return lo, max(lo, hi)

    def raw_nbytes(self, lo: int, hi: int) -> int:
        """Of tokens ``[lo, hi)`` in one layer, and of a hybrid model's state where the grant ends."""
        num_state = len(self.state_blocks) if hi == self._grant.end else 0
        return 2 * (hi - lo) * self._source.row_nbytes + num_state * self._source.block_nbytes

    @property
    def may_be_encoded(self) -> bool:
        """It has rows and nothing else, and ends in no block that others may write to as well."""
        size = self._source.block_size
        is_even = self.begin % size == 0 and (self.end % size == 0 or self.end == self._grant.end)
        return self._source.has_rows and not self._source.num_state_blocks and is_even

    def target_spans(self, lo: int, hi: int) -> Iterator[tuple[int, int, int]]:
        """``(block, first row, number of rows)`` of tokens ``[lo, hi)`` in the receiver's pool."""
        return block_spans(self._grant.blocks, self._grant.matched, lo, hi, self._source.block_size)


class LaneWriter:
    """One writer's part of one grant: claim, then put layer by layer, then finish or fail.

    Whatever happens after ``claim`` has been called, call ``finish`` or ``fail``: until then the receiver
    cannot use those blocks for anything else. One thread at a time.
    """

    def __init__(
        self,
        heap: Heap,
        peer: PeerHeap,
        grant: Grant,
        lane: int,
        begin: int,
        end: int,
        *,
        checksums: bool = False,
        encoded: bool = False,
    ) -> None:
        """``peer`` is ``heap`` attached to the grant's heap. ``encoded``: may put payloads, where the heap
        takes them and the bounds are right for it (``is_encoded``). Errors as :class:`TransferPlan`, and
        :class:`InvalidRequest` for a lane or slot that does not exist."""
        if peer.address.incarnation != grant.heap.incarnation:
            raise TransferFailed(
                f"the grant is for heap {grant.heap.incarnation:#x}, not {peer.address.incarnation:#x}"
            )
        if not 0 <= lane < MAX_LANES:
            raise InvalidRequest(f"lane is {lane}, 0 to {MAX_LANES - 1}", field="lane")
        if not 0 <= grant.slot < peer.words.num_slots:
            raise InvalidRequest(f"slot is {grant.slot}, below {peer.words.num_slots}", field="grant.slot")
        self.plan = TransferPlan(heap.layout, peer.layout, grant, begin, end)
        self.is_encoded = encoded and peer.takes_payloads and self.plan.may_be_encoded
        self.plan.is_whole |= self.is_encoded
        self._heap = heap
        self._peer = peer
        self._grant = grant
        self._lane = lane
        self._has_checksums = checksums
        self._is_claimed = False
        self._is_over = False
        self._next = [self.plan.begin] * heap.layout.num_layers
        self._sums = [0] * heap.layout.num_layers
        self._tag = grant_tag(grant.incarnation, grant.slot, grant.generation)
        self._chunk: tuple[int, int, tuple[int, ...]] | None = None
        self._copies = Copies(())
        self._target_blocks: NDArray[np.int64] = np.empty(0, np.int64)

    def claim(self) -> None:
        """Take the lane. :class:`TransferFailed`, with no KV written and nothing held, if the grant is
        closed, if the lane is or was somebody's, or if it is encoded and another one brings some of its
        tokens."""
        if self._is_claimed or self._is_over:
            raise InternalError("claim: a writer claims once")
        peer, words, slot, lane = self._peer, self._peer.words, self._grant.slot, self._lane
        if not peer.hold(slot, lane):
            raise TransferFailed(f"lane {lane} of grant {self._grant.grant_id} is held by another writer")
        try:
            self.require_grant_open()
            # Counts only grow: what another writer left in this lane under this grant cannot be continued.
            if peer.read(words.claim(slot, lane)) >> 8 == self._grant.generation:
                raise TransferFailed(
                    f"lane {lane} of grant {self._grant.grant_id} was used by another writer"
                )
        except TransferFailed:
            peer.let_go(slot, lane)
            raise
        self._is_claimed = True
        flags = CLAIMED | (CHECKSUMMED if self._has_checksums else 0) | (ENCODED if self.is_encoded else 0)
        peer.signal(words.writer(slot, lane), self._heap.address.incarnation)
        peer.signal(words.begin(slot, lane), pack_count(self._grant.generation, self.plan.begin))
        peer.signal(words.end(slot, lane), pack_count(self._grant.generation, self.plan.end))
        # Last: it makes the others mean something.
        peer.signal(words.claim(slot, lane), pack_state(self._grant.generation, flags))
        if self.is_encoded:
            self._require_alone()

    def put_layer(
        self, layer: int, source_blocks: Sequence[int], lo: int, hi: int, state_blocks: Sequence[int] = ()
    ) -> int:
        """Put the part of tokens ``[lo, hi)`` that this lane carries, and signal it; returns its bytes.

        ``source_blocks`` is the sender's block table of tokens ``[0, hi)``, ``state_blocks`` those of a
        hybrid model's state at ``hi``, which are put with the grant's last token. Ranges of one layer
        follow each other; a block that has to be whole first (``TransferPlan.cut``) goes with a later one.
        :class:`TransferFailed`, with nothing written, if the grant has been closed: call ``fail`` then.
        """
        self._require_writable("put_layer")
        lo, hi = self.plan.cut(lo, hi)
        if lo >= hi:
            return 0
        if lo != self._next[layer]:
            raise InternalError(f"put_layer: [{lo}, {hi}) does not follow {self._next[layer]}, layer {layer}")
        self.require_grant_open()
        self._prepare(source_blocks, lo, hi, state_blocks)
        peer, words, slot, lane = self._peer, self._peer.words, self._grant.slot, self._lane
        mine = self._heap.layout
        peer.put(self._copies, layer * mine.layer_nbytes, layer * peer.layout.layer_nbytes)
        peer.signal_each(words.tags(layer, self._target_blocks), self._tag)
        if self._has_checksums:
            spans = [*block_spans(source_blocks, 0, lo, hi, mine.block_size)]
            if hi == self._grant.end:
                spans += [(block, 0, mine.block_size) for block in state_blocks]
            self._sums[layer] = extend_checksum(self._sums[layer], self._heap, layer, spans)
            peer.signal(words.checksum(slot, lane, layer), self._sums[layer])
        self._next[layer] = hi
        peer.signal(words.arrival(slot, lane, layer), self._count(layer))
        return self._copies.nbytes

    def put_payload(self, layer: int, payload: NDArray[np.uint8], lo: int, hi: int) -> int:
        """Put a codec's payload of tokens ``[lo, hi)``, which ``TransferPlan.cut`` leaves as they are, and
        signal it; returns its bytes, fewer than the rows have. Order and errors as of :meth:`put_layer`."""
        self._require_writable("put_payload")
        if not self.is_encoded or (lo, hi) != self.plan.cut(lo, hi) or lo != self._next[layer]:
            raise InternalError(
                f"put_payload: [{lo}, {hi}) does not follow {self._next[layer]}, layer {layer}"
            )
        self.require_grant_open()
        peer, words, slot, lane = self._peer, self._peer.words, self._grant.slot, self._lane
        blocks = [block for block, _, _ in self.plan.target_spans(lo, hi)]
        copies = payload_copies(payload_spans(peer.layout, blocks, hi - lo), payload.size)
        if copies.nbytes != payload.size:
            raise InternalError(f"put_payload: {payload.size} bytes for [{lo}, {hi})")
        peer.put_payload(payload, copies, layer * peer.layout.layer_nbytes)
        peer.signal_each(words.tags(layer, blocks), payload_tag(self._tag))
        if self._has_checksums:
            self._sums[layer] = extend_by_payload(self._sums[layer], payload)
            peer.signal(words.checksum(slot, lane, layer), self._sums[layer])
        self._next[layer] = hi
        peer.signal(words.arrival(slot, lane, layer), self._count(layer))
        return copies.nbytes

    def set_first_token(self, token: int) -> None:
        """Leave the first output token for the receiver."""
        self._require_writable("set_first_token")
        word = self._peer.words.first_token(self._grant.slot, self._lane)
        self._peer.signal(word, pack_count(self._grant.generation, token + 1))

    def finish(self) -> None:
        """Nothing more will be written. If a layer is not whole, the receiver sees that. Idempotent."""
        if self._is_claimed and not self._is_over:
            self._peer.let_go(self._grant.slot, self._lane)
        self._is_over = True

    @property
    def is_drained(self) -> bool:
        """It is over, and none of its puts is on its way: the source blocks may be overwritten."""
        is_held = self._is_claimed and self._peer.holds(self._grant.slot, self._lane)
        return self._is_over and not is_held

    def fail(self) -> None:
        """Give up: tell the receiver so in every layer, then finish. Idempotent; nothing after ``finish``."""
        if self._is_claimed and not self._is_over:
            for layer in range(self._heap.layout.num_layers):
                word = self._peer.words.arrival(self._grant.slot, self._lane, layer)
                self._peer.signal(word, POISON | self._count(layer))
        self.finish()

    def _count(self, layer: int) -> int:
        return pack_count(self._grant.generation, self._next[layer] - self.plan.begin)

    def _prepare(
        self, source_blocks: Sequence[int], lo: int, hi: int, state_blocks: Sequence[int] = ()
    ) -> None:
        """Plan a chunk once for all its layers."""
        layout = self._heap.layout
        blocks = (*source_blocks[lo // layout.block_size : layout.num_blocks_for(hi)], *state_blocks)
        chunk = (lo, hi, blocks)
        if chunk != self._chunk:
            self._copies = self.plan.copies(source_blocks, lo, hi, state_blocks)
            targets = [block for block, _, _ in self.plan.target_spans(lo, hi)]
            if hi == self._grant.end:
                targets += self.plan.state_blocks
            self._target_blocks = np.array(targets, np.int64)
            self._chunk = chunk

    def _require_alone(self) -> None:
        """After the claim."""
        peer, words, slot, generation = self._peer, self._peer.words, self._grant.slot, self._grant.generation
        with _FENCE:
            pass
        for lane in range(MAX_LANES):
            if lane == self._lane or peer.read(words.claim(slot, lane)) >> 8 != generation:
                continue
            begin = count_of(peer.read(words.begin(slot, lane)), generation)
            end = count_of(peer.read(words.end(slot, lane)), generation)
            if begin is None or end is None or (begin < self.plan.end and self.plan.begin < end):
                self.fail()
                raise TransferFailed(
                    f"lane {self._lane} of grant {self._grant.grant_id} is encoded, and lane {lane} brings "
                    f"some of its tokens [{self.plan.begin}, {self.plan.end})"
                )

    def require_grant_open(self) -> None:
        """:class:`TransferFailed` if it has been closed: nothing more may be put."""
        state = self._peer.read(self._peer.words.state(self._grant.slot))
        if state != pack_state(self._grant.generation, OPEN):
            raise TransferFailed(f"grant {self._grant.grant_id} is closed")

    def _require_writable(self, name: str) -> None:
        if not self._is_claimed or self._is_over:
            raise InternalError(f"{name}: the lane is not claimed, or its writer is done")


def _check_whole_blocks(layout: KvLayout, grant: Grant, begin: int, end: int) -> None:
    """Where blocks are only copied whole, two writers that met inside one would undo each other's rows."""
    for name, bound in (("begin", begin), ("end", end)):
        if bound % layout.block_size and bound != grant.end:
            raise InvalidInterval(
                f"{name} is {bound}: blocks of {layout.order!r} are sent whole, so a multiple of "
                f"{layout.block_size} or the grant's end",
                field=name,
            )


def _check_blocks(grant: Grant, target: KvLayout) -> None:
    """A grant comes over the wire, and its blocks become addresses."""
    if not 0 <= grant.matched <= grant.end or grant.matched % grant.block_size:
        raise InvalidRequest(f"matched is {grant.matched} of {grant.end}", field="grant.matched")
    if len(grant.blocks) != target.num_grant_blocks(grant.matched, grant.end):
        raise InvalidRequest(
            f"{len(grant.blocks)} blocks for [{grant.matched}, {grant.end})", field="grant.blocks"
        )
    if any(not 0 <= block < target.num_blocks for block in grant.blocks):
        raise InvalidRequest(f"a block is outside 0 to {target.num_blocks - 1}", field="grant.blocks")
    if len(set(grant.blocks)) < len(grant.blocks):
        raise InvalidRequest("a block occurs twice", field="grant.blocks")
