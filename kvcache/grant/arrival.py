"""What the writers of one grant have brought so far, read from the words that they left.

    lane 0   BEGIN ▒▒▒▒▒▒▒▒▒▒ +count
    lane 1              BEGIN ▒▒▒▒▒▒▒▒▒▒ +count
    frontier          matched ────────>|             contiguous, over the union of the lanes

Of an encoded lane those tokens count that are decoded (decoding.py); where another lane brings one of its
tokens too, nothing counts (writer.py says why).

Only reads. Does not know who asked for the KV, nor who frees the blocks (table.py).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from microserve.kvcache.grant.checksum import extend_checksum
from microserve.kvcache.grant.decoding import LaneDecoder
from microserve.kvcache.heap.heap import Heap
from microserve.kvcache.layout import block_spans
from microserve.kvcache.words import CHECKSUMMED, ENCODED, POISON, count_of, grant_tag
from microserve.protocol.errors import InternalError, TransferFailed
from microserve.protocol.messages.kv.grant import MAX_LANES, Grant


class _Claim(NamedTuple):
    """What a lane will bring, if a writer has claimed it under this grant."""

    lane: int
    begin: int
    end: int
    is_encoded: bool

    def meets(self, other: _Claim) -> bool:
        return self.begin < other.end and other.begin < self.end


class Arrival:
    """For the owner of ``heap``, while the grant is open or sealed."""

    def __init__(self, heap: Heap, grant: Grant, *, verify_checksums: bool, may_lose: bool = False) -> None:
        """``may_lose``: payloads that lose some of the KV are welcome."""
        self._heap = heap
        self._grant = grant
        self._verify_checksums = verify_checksums
        self._complete_layers: set[int] = set()
        self._blocks = np.array(grant.blocks, np.int64)
        self._tag = grant_tag(grant.incarnation, grant.slot, grant.generation)
        self._may_lose = may_lose
        self._decoders: dict[int, LaneDecoder] = {}

    # --- encoded lanes -------------------------------------------------------------------------------

    def new_decoders(self) -> list[LaneDecoder]:
        """Of encoded lanes that were claimed since the last call: nothing that they bring counts before it
        has gone through these. The grant says what is decoded."""
        data = self._heap.host_data
        if self._grant.decoding is None or data is None:
            return []
        made = []
        for lane in range(MAX_LANES):
            if lane in self._decoders or (claim := self._claim(lane)) is None or not claim.is_encoded:
                continue
            decoder = LaneDecoder(
                self._heap,
                data,
                self._grant,
                lane,
                claim.begin,
                claim.end,
                may_lose=self._may_lose,
                verify_checksums=self._verify_checksums,
            )
            self._decoders[lane] = decoder
            made.append(decoder)
        return made

    def stop_decoding(self) -> None:
        """No rows are wanted any more, or all are here."""
        for decoder in self._decoders.values():
            decoder.stop()

    @property
    def is_decoding(self) -> bool:
        """A decoder may be writing into the grant's blocks."""
        return any(decoder.is_at_work for decoder in self._decoders.values())

    @property
    def is_lossy(self) -> bool:
        """Some of what counts has come by a payload that loses."""
        return any(decoder.is_lossy for decoder in self._decoders.values())

    # --- what is here --------------------------------------------------------------------------------

    def frontier(self, layer: int) -> int:
        """KV of tokens ``[matched, frontier)`` is here in this layer, from all lanes together."""
        grant, words, load = self._grant, self._heap.words, self._heap.load
        spans = []
        # Before the claims: who counts has claimed, and what a lane says without a claim counts for nothing.
        words_of = [load(words.arrival(grant.slot, lane, layer)) for lane in range(MAX_LANES)]
        claims = self._claims()
        if _shares(claims):
            return grant.matched
        for claim in claims:
            count = count_of(words_of[claim.lane], grant.generation)
            if count and claim.is_encoded:
                decoder = self._decoders.get(claim.lane)
                count = decoder.decoded(layer) if decoder is not None else 0
            if count:
                spans.append((claim.begin, claim.begin + count))
        frontier = grant.matched
        for begin, end in sorted(spans):
            if begin <= frontier:
                frontier = max(frontier, end)
        return frontier

    def layer_complete(self, layer: int) -> bool:
        # Counts only grow, so what was complete stays so.
        if layer not in self._complete_layers and self.frontier(layer) == self._grant.end:
            self._complete_layers.add(layer)
        return layer in self._complete_layers

    def is_complete(self) -> bool:
        """All layers are here. Writers do the last layer last, so it is asked first."""
        return all(self.layer_complete(layer) for layer in reversed(range(self._heap.layout.num_layers)))

    def poisoned(self, *, await_first: bool = False) -> str | None:
        """Why the grant will never complete, as far as the lanes that were claimed can tell.

        With ``await_first`` a writer that has left without a first token counts as gone too early."""
        grant, words = self._grant, self._heap.words
        load, load_each = self._heap.load, self._heap.load_each
        claims = self._claims()
        if shared := _shares(claims):
            return f"lane {shared.lane} is encoded, and another one brings some of its tokens"
        for claim in claims:
            decoder = self._decoders.get(claim.lane)
            if decoder is not None and decoder.fault is not None:
                return f"lane {claim.lane}: {decoder.fault}"
            if claim.is_encoded and grant.decoding is None:
                return f"lane {claim.lane} is encoded, and nothing is decoded here"
        for lane in range(MAX_LANES):
            if self._interval(lane) is None and self._is_untouched(lane):
                # Not to be asked who holds it: the question itself could make its writer's ``hold`` fail.
                continue
            # Asked before the words are read: after a False they are final.
            is_held = self._heap.is_held(grant.slot, lane)
            interval = self._interval(lane)
            arrivals = load_each(words.arrivals(grant.slot, lane)).tolist()
            counts = [count_of(word, grant.generation) for word in arrivals]
            has_given_up = any(
                word & POISON and count is not None for word, count in zip(arrivals, counts, strict=True)
            )
            if interval is None:
                if not is_held:
                    what = "its writer was cut off" if has_given_up else "KV has come"
                    return f"lane {lane}: {what} without a claim"
                continue
            writer = f"lane {lane}: the writer {load(words.writer(grant.slot, lane)):#x}"
            if has_given_up:
                return f"{writer} gave up"
            begin, end = interval
            if not is_held and any((count or 0) < end - begin for count in counts):
                return f"{writer} is gone before its part was whole"
            if not is_held and await_first and end == grant.end and self.first_token() is None:
                return f"{writer} is gone without a first token"
        return None

    def first_token(self) -> int | None:
        """The first output token, if a writer has sampled and left it."""
        for lane in range(MAX_LANES):
            word = self._heap.load(self._heap.words.first_token(self._grant.slot, lane))
            if value := count_of(word, self._grant.generation):
                return value - 1
        return None

    def verify(self, layer: int) -> None:
        """Check a complete layer before its first use.

        Every block was last written under this very grant, so a late write under an older one shows. With
        ``verify_checksums`` every byte is the one that its writer read, where that writer sums and shares
        no token with another lane. :class:`TransferFailed` names layer and block.
        """
        if not self.layer_complete(layer):
            raise InternalError(f"verify: layer {layer} of grant {self._grant.grant_id} is not complete")
        tags, tag = self._heap.load_each(self._heap.words.tags(layer, self._blocks)), self._tag
        wrong = np.flatnonzero(tags != np.uint64(tag)).tolist()
        if wrong:
            found, block = tags.item(wrong[0]), self._grant.blocks[wrong[0]]
            raise TransferFailed(f"layer {layer}, block {block}: tag {found:#x}, not {tag:#x}")
        if self._verify_checksums:
            self._verify_sums(layer)

    def _verify_sums(self, layer: int) -> None:
        grant, words = self._grant, self._heap.words
        claims = self._claims()
        for claim in claims:
            lane, begin, end, is_encoded = claim
            # Two engines round differently: in rows that both wrote either one's bytes are right, and
            # neither one's sum is. Of an encoded lane the decoder has summed what came.
            is_alone = not any(claim.meets(other) for other in claims if other is not claim)
            has_sums = self._heap.load(words.claim(grant.slot, lane)) & CHECKSUMMED
            if begin == end or not is_alone or not has_sums or is_encoded:
                continue
            rows = list(block_spans(grant.blocks, grant.matched, begin, end, grant.block_size))
            if end == grant.end:
                first = self._heap.layout.num_blocks_for(end - grant.matched)
                rows += [(block, 0, grant.block_size) for block in grant.blocks[first:]]
            found = extend_checksum(0, self._heap, layer, rows)
            expected = self._heap.load(words.checksum(grant.slot, lane, layer))
            if found != expected:
                blocks = [block for block, _, _ in rows]
                raise TransferFailed(
                    f"layer {layer}, lane {lane}, tokens [{begin}, {end}), blocks {blocks}: "
                    f"checksum {found:#x}, its writer's {expected:#x}"
                )

    def _claims(self) -> list[_Claim]:
        return [claim for lane in range(MAX_LANES) if (claim := self._claim(lane)) is not None]

    def _claim(self, lane: int) -> _Claim | None:
        slot, generation = self._grant.slot, self._grant.generation
        words, load = self._heap.words, self._heap.load
        word = load(words.claim(slot, lane))
        if word >> 8 != generation:
            return None
        begin = count_of(load(words.begin(slot, lane)), generation)
        end = count_of(load(words.end(slot, lane)), generation)
        return None if begin is None or end is None else _Claim(lane, begin, end, bool(word & ENCODED))

    def _interval(self, lane: int) -> tuple[int, int] | None:
        """Tokens that the lane will bring, if a writer has claimed it under this grant."""
        claim = self._claim(lane)
        return None if claim is None else (claim.begin, claim.end)

    def _is_untouched(self, lane: int) -> bool:
        """Nothing has been counted, nor given up, in this lane under this grant."""
        arrivals = self._heap.load_each(self._heap.words.arrivals(self._grant.slot, lane)).tolist()
        return all(count_of(word, self._grant.generation) is None for word in arrivals)


def _shares(claims: list[_Claim]) -> _Claim | None:
    """An encoded lane of whose tokens another one brings some; None: there is none."""
    for claim in claims:
        if claim.is_encoded and any(claim.meets(other) for other in claims if other is not claim):
            return claim
    return None
