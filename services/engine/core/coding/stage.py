"""The codec stage of one engine: its encoder and decoder, and what becomes of sends that go by them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from microserve.kvcache.grant.writer import LaneWriter
from microserve.kvcache.heap.heap import Heap
from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.kv.grant import Grant
from microserve.services.engine.core.coding.choice import Choices, CodecOptions
from microserve.services.engine.core.coding.decoder import DecoderThreads
from microserve.services.engine.core.coding.encoder import Encoder
from microserve.services.engine.core.coding.outgoing import Outgoing


class Ended(Protocol):
    """A send that was put (request/sequence.py)."""

    @property
    def grant(self) -> Grant: ...
    @property
    def outgoing(self) -> Outgoing | None: ...
    @property
    def writer(self) -> LaneWriter | None: ...


class CodecStage:
    def __init__(
        self,
        heap: Heap,
        options: CodecOptions | None,
        *,
        on_change: Callable[[], None],
        clock: Callable[[], float],
        seed: int,
        chunk_tokens: int,
    ) -> None:
        """``options``: None encodes and decodes nothing; nor is there anything where blocks have no rows in
        memory of this process, or hold more than KV. ``on_change`` is called by threads that hold no lock.

        Raises :class:`ConfigError` for a library that is of other KV."""
        layout = heap.layout
        self._clock = clock
        self._ended: list[tuple[Grant, Outgoing, LaneWriter]] = []
        self.encoder: Encoder | None = None
        self.decoder: DecoderThreads | None = None
        is_plain = layout.has_rows and not layout.geometry.layers and heap.host_data is not None
        if options is not None and is_plain:
            threads = options.num_threads
            self.encoder = Encoder(heap, num_threads=threads, on_done=on_change, clock=clock)
            self.decoder = DecoderThreads(num_threads=threads, on_over=on_change, clock=clock)
        self._choices = Choices(
            *(layout, self.encoder, options or CodecOptions()),
            seed=seed,
            chunk_tokens=chunk_tokens,
            clock=clock,
        )

    def outgoing(self, message: wire.RemoteSend, num_tokens: int, link_bytes_per_s: float) -> Outgoing | None:
        """As ``Choices.outgoing``."""
        return self._choices.outgoing(message, num_tokens, link_bytes_per_s)

    def ended(self, transfer: Ended) -> None:
        """All of it is put; how long it took shows when the last byte is there."""
        if transfer.outgoing is not None and transfer.writer is not None:
            self._ended.append((transfer.grant, transfer.outgoing, transfer.writer))

    def poll(self) -> None:
        """Once a step, and on idle ticks; after the peers'."""
        if self.decoder is not None:
            self.decoder.poll()
        if not self._ended:
            return
        now, waiting = self._clock(), []
        for grant, outgoing, writer in self._ended:
            if not writer.is_drained:
                waiting.append((grant, outgoing, writer))
                continue
            ns_per_byte = grant.decoding.ns_per_byte if grant.decoding is not None else 0.0
            decode_s = ns_per_byte * 1e-9 * outgoing.raw_nbytes if outgoing.is_encoded else 0.0
            self._choices.observe(grant.engine_id, outgoing, now, decode_s)
        self._ended = waiting

    def close(self) -> None:
        """When this returns no thread reads or writes blocks. Not with the engine's lock held."""
        for part in (self.encoder, self.decoder):
            if part is not None:
                part.close()
