"""What an encoded lane brings, made into rows: the receiver's decoder of one lane.

    arrival word   ├── rows or payloads are here ──────────────┤
    decoded        ├── rows stand here ────────┤                        arrival.py counts these
                                               └ advance: the next piece

A piece is a payload, which begins with a header and lies in blocks that carry the payload's tag, or a block
that came as rows. A payload is copied, checked and decoded beside the blocks; its rows are written when all
of it was found good, and the lane counts them after that. What is not good is the lane's fault, for ever:
nothing of it counts any more, and the grant fails.

``advance`` runs in a thread of its own, beside the engine's; everything else is asked under the engine's
lock. Writes into the blocks while :attr:`is_at_work` only, so who has called ``stop`` and then finds it False
has proof that none comes any more (table.py counts it as a lane that is held).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from microserve.kvcache.codec.codec import decode
from microserve.kvcache.codec.frame import HEADER_NBYTES, CodecFailed, Header, header
from microserve.kvcache.grant.checksum import extend_by_payload, extend_checksum
from microserve.kvcache.grant.payload import Bytes, LayerRows, payload_spans
from microserve.kvcache.heap.heap import Heap
from microserve.kvcache.layout import block_spans
from microserve.kvcache.words import CHECKSUMMED, count_of, grant_tag, payload_tag
from microserve.protocol.errors import TransferFailed
from microserve.protocol.messages.kv.coding import Decoding
from microserve.protocol.messages.kv.geometry import Geometry
from microserve.protocol.messages.kv.grant import Grant

Decode = Callable[[Bytes, int, Geometry, Bytes, Bytes], Header]
"""``codec.decode``."""


class Decoder(Protocol):
    """Who runs the decoders of lanes, and what grants say of that."""

    @property
    def terms(self) -> Decoding: ...
    def add(self, lane: LaneDecoder) -> None:
        """Something comes through it: let it advance until it is over."""


class LaneDecoder:
    """Of tokens ``[begin, end)``, which one lane of ``grant`` brings."""

    def __init__(
        self,
        heap: Heap,
        data: NDArray[np.uint8],
        grant: Grant,
        lane: int,
        begin: int,
        end: int,
        *,
        may_lose: bool,
        verify_checksums: bool,
        decode: Decode = decode,
    ) -> None:
        """``data``: ``heap.host_data``. ``may_lose``: payloads that lose something are welcome."""
        self.lane = lane
        self.is_lossy = False
        """Something that counts came by a payload that loses."""
        self.fault: str | None = None
        self.nbytes = 0
        """Of rows that were decoded from payloads."""
        self._heap = heap
        self._rows = LayerRows(heap.layout, data)
        self._grant = grant
        self._begin, self._end = begin, end
        self._may_lose = may_lose
        self._decode = decode
        words, slot = heap.words, grant.slot
        self._arrivals = words.arrivals(slot, lane)
        has_sums = bool(heap.load(words.claim(slot, lane)) & CHECKSUMMED)
        self._verifies = verify_checksums and has_sums
        self._sums = [0] * heap.layout.num_layers
        self._tag = grant_tag(grant.incarnation, slot, grant.generation)
        self._geometry = heap.layout.geometry
        self._decoded = [0] * heap.layout.num_layers
        self._lock = threading.Lock()
        self._is_stopped = False
        self._is_at_work = False

    # --- under the engine's lock ---------------------------------------------------------------------

    def decoded(self, layer: int) -> int:
        """Tokens since ``begin`` whose rows stand in their blocks."""
        return self._decoded[layer] if self.fault is None else 0

    def stop(self) -> None:
        """Nothing more is wanted of it: no piece is begun any more. Idempotent."""
        with self._lock:
            self._is_stopped = True

    @property
    def is_at_work(self) -> bool:
        """It may be writing into the blocks: a piece counts when its rows are written, so not once all do."""
        return self._is_at_work and not self._is_whole

    # --- in the decoder's thread ---------------------------------------------------------------------

    @property
    def is_over(self) -> bool:
        """There is nothing left to do, whatever still comes."""
        return self._is_stopped or self.fault is not None or self._is_whole

    @property
    def waiting_nbytes(self) -> int:
        """Of rows that are here, or will be, and are not decoded."""
        missing = sum(self._end - self._begin - count for count in self._decoded)
        return 0 if self._is_stopped else missing * 2 * self._heap.layout.row_nbytes

    def advance(self) -> bool:
        """Do the next piece that is here; False: none is now, or ever."""
        with self._lock:
            if self._is_stopped or self.fault is not None:
                return False
            self._is_at_work = True
        try:
            return self._advance()
        except TransferFailed as error:
            self.fault = error.detail
            return False
        except Exception as error:
            self.fault = f"it cannot be decoded: {error!r}"[:512]
            return False
        finally:
            self._is_at_work = False

    def _advance(self) -> bool:
        arrived = [
            min(count_of(word, self._grant.generation) or 0, self._end - self._begin)
            for word in self._heap.load_each(self._arrivals).tolist()
        ]
        # Layers come one after the other, and whoever waits wants the first ones first.
        ready = [layer for layer, count in enumerate(arrived) if count > self._decoded[layer]]
        if not ready:
            return False
        layer = min(ready, key=lambda each: self._decoded[each])
        lo, hi = self._begin + self._decoded[layer], self._begin + arrived[layer]
        blocks = [b for b, _, _ in block_spans(self._grant.blocks, self._grant.matched, lo, hi, self._size)]
        tags = self._heap.load_each(self._heap.words.tags(layer, blocks)).tolist()
        num_rows = 0  # blocks that came as rows
        while num_rows < len(tags) and tags[num_rows] == self._tag:
            num_rows += 1
        if num_rows:
            done = min(hi, lo + num_rows * self._size)
            if self._verifies:
                spans = block_spans(blocks, lo, lo, done, self._size)
                self._sums[layer] = extend_checksum(self._sums[layer], self._heap, layer, spans)
        elif tags[0] == payload_tag(self._tag):
            done = self._take_payload(layer, blocks, lo, hi)
        else:
            raise TransferFailed(f"layer {layer}, block {blocks[0]}: tag {tags[0]:#x}, not {self._tag:#x}")
        if self._verifies and done == self._end:
            self._verify(layer)
        self._decoded[layer] = done - self._begin
        return True

    @property
    def _is_whole(self) -> bool:
        return all(count >= self._end - self._begin for count in self._decoded)

    @property
    def _size(self) -> int:
        return self._heap.layout.block_size

    def _take_payload(self, layer: int, blocks: list[int], lo: int, hi: int) -> int:
        """Decode the payload that begins with token ``lo``, of those below ``hi``; where it ends."""
        layout = self._heap.layout
        where = f"layer {layer}, tokens [{lo}, {hi})"
        spans = payload_spans(layout, blocks, hi - lo)
        try:
            said = header(self._rows.payload(layer, spans, min(HEADER_NBYTES, _room(spans))))
            done = lo + said.num_tokens
            if not lo < done <= hi or (done % self._size and done != self._end):
                raise CodecFailed(f"{said.num_tokens} tokens, of {hi - lo} that are here")
            blocks = blocks[: layout.num_blocks_for(done - lo)]
            spans = payload_spans(layout, blocks, done - lo)
            if said.nbytes > _room(spans):
                raise CodecFailed(f"{said.nbytes} bytes, of {_room(spans)} that its blocks have")
            payload = self._rows.payload(layer, spans, said.nbytes)
            keys, values = (np.empty((done - lo, layout.row_nbytes), np.uint8) for _ in range(2))
            # Of the copy: the header that was read first may be another one by now.
            said = self._decode(payload, layer, self._geometry, keys, values)
        except CodecFailed as error:
            raise TransferFailed(f"{where}: {error.detail}") from None
        if said.is_lossy and not self._may_lose:
            raise TransferFailed(f"{where}: the payload loses some of the KV, and the request allows no loss")
        if self._verifies:
            self._sums[layer] = extend_by_payload(self._sums[layer], payload)
        self.is_lossy |= said.is_lossy
        self._rows.scatter(layer, blocks, keys, values)
        for word in self._heap.words.tags(layer, blocks).tolist():
            self._heap.store(word, self._tag)
        self.nbytes += keys.nbytes + values.nbytes
        return done

    def _verify(self, layer: int) -> None:
        word = self._heap.words.checksum(self._grant.slot, self.lane, layer)
        expected = self._heap.load(word)
        if self._sums[layer] != expected:
            raise TransferFailed(
                f"layer {layer}, tokens [{self._begin}, {self._end}): checksum {self._sums[layer]:#x}, "
                f"its writer's {expected:#x}"
            )


def _room(spans: list[tuple[int, int]]) -> int:
    return sum(nbytes for _, nbytes in spans)
