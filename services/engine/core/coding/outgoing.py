"""One send that goes by a codec: its pieces, from the layer that was computed to the bytes that were put.

    put_layer ──> piece ──encoder──> done ──put_ready──> put
                  in order; the first that is not done holds up the others

Everything but the encoding is of the thread that steps, or under the engine's lock while no step has the send
in hand: who puts is one thread at a time. Where the encoder makes nothing smaller of a piece, it goes as it
is, in its turn. Knows its lane's writer; neither requests nor who frees the blocks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from microserve.kvcache.codec.choice.decision import Decision, Reason
from microserve.kvcache.codec.codec import Codec
from microserve.kvcache.codec.profile import NONE
from microserve.kvcache.grant.writer import LaneWriter
from microserve.protocol.errors import TransferFailed
from microserve.protocol.messages.kv.coding import Coding
from microserve.services.engine.core.coding.encoder import Encoder, Piece


class Outgoing:
    def __init__(
        self,
        decision: Decision,
        link_bytes_per_s: float,
        encoder: Encoder | None = None,
        codec: Codec | None = None,
        clock: Callable[[], float] = lambda: 0.0,
    ) -> None:
        """Without ``codec`` everything goes as it is, and this only tells of it."""
        self.decision = decision
        self.link_bytes_per_s = link_bytes_per_s
        self._encoder = encoder
        self._codec = codec
        self._clock = clock
        self._pieces: deque[Piece] = deque()
        self._cancelled: list[Piece] = []
        self._table: list[int] = []
        """Block table that pieces share."""
        self.raw_nbytes = self.wire_nbytes = 0
        self.encode_s = 0.0
        self._is_lossy = False
        self._began_at: float | None = None
        self._busy_until = 0.0
        self._idle_s = 0.0

    @property
    def is_encoded(self) -> bool:
        """Something may go by a codec: its lane is to be claimed so."""
        return self._codec is not None

    @property
    def is_idle(self) -> bool:
        """Everything that was given to it has been put."""
        return not self._pieces

    @property
    def is_free(self) -> bool:
        """No block is read for it."""
        return all(piece.is_done for piece in (*self._pieces, *self._cancelled))

    @property
    def is_ready(self) -> bool:
        """``put_ready`` has something to put."""
        return bool(self._pieces) and self._pieces[0].is_done

    def put_layer(
        self,
        writer: LaneWriter,
        layer: int,
        blocks: list[int],
        lo: int,
        hi: int,
        state_blocks: Sequence[int] = (),
    ) -> int:
        """As ``LaneWriter.put_layer``, at once or later; the bytes that were put now."""
        now, given = self._clock(), (lo, hi)
        lo, hi = writer.plan.cut(lo, hi)
        if lo >= hi:
            return 0
        if self._began_at is None:
            self._began_at = self._busy_until = now
        if not self._pieces:
            self._idle_s += max(0.0, now - self._busy_until)
        self.raw_nbytes += writer.plan.raw_nbytes(lo, hi)
        if self._codec is not None and not writer.is_encoded:
            # What it takes now says nothing of the profile.
            self.decision = Decision(NONE, Reason.REFUSED, detail="its lane takes no payloads")
            self._codec = None
        if self._encoder is None or self._codec is None:
            return self._was_put(writer.put_layer(layer, blocks, *given, state_blocks))
        if self._table != blocks:
            self._table = list(blocks)
        piece = Piece(self._codec, layer, lo, hi, self._table)
        self._pieces.append(piece)
        self._encoder.add(piece)
        return self.put_ready(writer)

    def put_ready(self, writer: LaneWriter) -> int:
        """Put what is encoded; its bytes. :class:`TransferFailed`: call :meth:`cancel`, and
        ``writer.fail``."""
        nbytes = 0
        while self.is_ready:
            piece = self._pieces.popleft()
            self.encode_s += piece.seconds
            if self._encoder is not None:
                self._encoder.release(piece)  # first: putting may fail, and nobody has the piece then
            try:
                nbytes += self._was_put(self._put(writer, piece))
            except (OSError, MemoryError) as error:
                raise TransferFailed(f"it cannot be sent: {error or type(error).__name__}") from None
        return nbytes

    def _put(self, writer: LaneWriter, piece: Piece) -> int:
        if piece.payload is None:
            return writer.put_layer(piece.layer, piece.blocks, piece.lo, piece.hi)
        self._is_lossy |= self.decision.profile.is_lossy
        return writer.put_payload(piece.layer, piece.payload, piece.lo, piece.hi)

    def put_all(self, writer: LaneWriter) -> int:
        """Wait for the encoder, and put everything; its bytes. Errors as of :meth:`put_ready`."""
        nbytes = 0
        while self._pieces and self._encoder is not None:
            self._encoder.finish(self._pieces[0])
            nbytes += self.put_ready(writer)
        return nbytes

    def cancel(self) -> None:
        """Nothing more is put. Its blocks may be read until :attr:`is_free`. Idempotent."""
        while self._pieces and self._encoder is not None:
            piece = self._pieces.popleft()
            self._encoder.cancel(piece)
            self._cancelled.append(piece)

    def wait_free(self) -> None:
        """When this returns no block is read for it."""
        for piece in self._cancelled:
            if self._encoder is not None:
                self._encoder.finish(piece)

    def coding(self, network_s: float = 0.0) -> Coding:
        """For ``Sent``. ``network_s``: that its bytes take on their way, where nobody waits for them."""
        decision = self.decision
        return Coding(
            profile=decision.profile.name,
            raw_nbytes=self.raw_nbytes,
            wire_nbytes=self.wire_nbytes,
            encode_s=self.encode_s,
            predicted_s=decision.predicted_s,
            observed_s=max(self.busy_s(self._busy_until), network_s),
            link_bytes_per_s=self.link_bytes_per_s,
            is_lossy=self._is_lossy,
            reason=str(decision.reason),
        )

    def busy_s(self, until: float) -> float:
        """Since the first piece, without the time in which the next one was still computed. ``until``: when
        the last byte was there."""
        return max(0.0, until - self._began_at - self._idle_s) if self._began_at is not None else 0.0

    def _was_put(self, nbytes: int) -> int:
        self.wire_nbytes += nbytes
        network_s = nbytes / self.link_bytes_per_s if self.link_bytes_per_s else 0.0
        self._busy_until = max(self._busy_until, self._clock()) + network_s
        return nbytes
