"""Threads that encode pieces of sends, in the order in which they come, while steps go on.

A piece reads the sender's blocks until it is done. So who gives blocks back lets it be finished first, or
cancels it and waits until :attr:`Piece.is_done`. Owns the threads and the memory of payloads; knows neither
peers nor requests.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import structlog

from microserve.kvcache.codec.codec import Codec
from microserve.kvcache.grant.payload import Bytes, LayerRows
from microserve.kvcache.heap.heap import Heap
from microserve.protocol import log

_logger = structlog.get_logger()

MAX_WAITING_NBYTES = 256 << 20
"""Of KV whose payloads are in the making, or wait to be put; what comes beyond it goes as it is."""


class Piece:
    """Tokens ``[lo, hi)`` of one layer of a send."""

    __slots__ = (
        "blocks",
        "codec",
        "hi",
        "is_done",
        "is_taken",
        "layer",
        "lo",
        "nbytes",
        "payload",
        "seconds",
    )

    def __init__(self, codec: Codec, layer: int, lo: int, hi: int, blocks: Sequence[int]) -> None:
        """``blocks``: the block table of tokens ``[0, hi)``."""
        self.codec = codec
        self.layer, self.lo, self.hi = layer, lo, hi
        self.blocks = blocks
        self.nbytes = 0
        """Of its rows, that count as waiting."""
        self.payload: Bytes | None = None
        """Once it is done; None: it goes as it is."""
        self.seconds = 0.0
        self.is_taken = False
        """Somebody encodes it, has, or never will."""
        self.is_done = False
        """The encoder reads no block for it, now or later."""


class Encoder:
    """``add`` and what follows of one thread; ``on_done`` is called by the others, after each piece."""

    def __init__(
        self,
        heap: Heap,
        *,
        num_threads: int,
        on_done: Callable[[], None],
        clock: Callable[[], float],
    ) -> None:
        """``num_threads``: 0 encodes in ``add``. The heap's data is memory of this process, in rows."""
        data = heap.host_data
        assert data is not None
        self._layout = heap.layout
        self._rows = LayerRows(heap.layout, data)
        self._num_threads = num_threads
        self._on_done = on_done
        self._clock = clock
        self._changed = threading.Condition()
        self._waiting: deque[Piece] = deque()
        self._threads: list[threading.Thread] = []
        self._is_closed = False
        self._nbytes = 0

    def add(self, piece: Piece) -> None:
        nbytes = 2 * (piece.hi - piece.lo) * self._layout.row_nbytes
        with self._changed:
            if self._nbytes + nbytes > MAX_WAITING_NBYTES:
                piece.is_taken = piece.is_done = True
                return
            piece.nbytes = nbytes
            self._nbytes += nbytes
        if not self._num_threads:
            self._take(piece)
            self._encode(piece)
            return
        with self._changed:
            self._waiting.append(piece)
            if len(self._threads) < self._num_threads and len(self._waiting) > len(self._threads):
                thread = threading.Thread(target=self._run, name="encode", daemon=True)
                self._threads.append(thread)
                thread.start()
            self._changed.notify()

    def finish(self, piece: Piece) -> None:
        """When this returns it is done, by this thread where no other one has begun."""
        if self._take(piece):
            self._encode(piece)
        with self._changed:
            while not piece.is_done:
                self._changed.wait()

    def cancel(self, piece: Piece) -> None:
        """Nobody wants its payload; it is done now, or when who encodes it has."""
        if self._take(piece):
            piece.is_done = True
        self.release(piece)

    def release(self, piece: Piece) -> None:
        """Its payload was handed on. Idempotent."""
        with self._changed:
            self._nbytes -= piece.nbytes
            piece.nbytes = 0

    def close(self) -> None:
        """When this returns no block is read. All pieces were cancelled, or are done."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._is_closed:
                    self._changed.wait()
                if self._is_closed:
                    return
                piece = self._waiting.popleft()
            if self._take(piece):
                self._encode(piece)
                self._on_done()

    def _take(self, piece: Piece) -> bool:
        with self._changed:
            is_mine = not piece.is_taken
            piece.is_taken = True
        return is_mine

    def _encode(self, piece: Piece) -> None:
        started = self._clock()
        payload: Bytes | None = None
        try:
            size, num_tokens = self._layout.block_size, piece.hi - piece.lo
            blocks = piece.blocks[piece.lo // size : self._layout.num_blocks_for(piece.hi)]
            keys, values = self._rows.gather(piece.layer, blocks, num_tokens)
            # A payload that is no smaller than the rows is none.
            out = np.empty(keys.nbytes + values.nbytes - 1, np.uint8)
            nbytes = piece.codec.encode(piece.layer, keys, values, out)
            if nbytes is not None:
                payload = out[:nbytes] if 2 * nbytes > out.size else out[:nbytes].copy()
        except Exception:  # it goes as it is, and the engine lives on
            _logger.exception(log.ENCODING_FAILED, layer=piece.layer, profile=piece.codec.profile.name)
        finally:
            with self._changed:
                piece.payload = payload
                piece.seconds = self._clock() - started
                piece.is_done = True
                self._changed.notify_all()
