"""Threads that decode what encoded lanes bring, while steps go on.

Payloads arrive by themselves: nobody is told. So a thread looks at the lanes that it has, by turns, and rests
a little when none of them has anything; without lanes it sleeps. Knows neither grants nor requests, but what
a lane's decoder (kvcache/grant/decoding.py) does for one call.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from microserve.kvcache.codec.codec import SUPPORTED
from microserve.kvcache.grant.decoding import LaneDecoder
from microserve.protocol.messages.kv.coding import Decoding
from microserve.protocol.smoothing import smoothed

LOOK_S = 0.0005
"""Between two looks where nothing has come."""


class DecoderThreads:
    """A ``Decoder`` of grants."""

    def __init__(self, *, num_threads: int, on_over: Callable[[], None], clock: Callable[[], float]) -> None:
        """``num_threads``: 0 decodes in :meth:`poll`. ``on_over`` is called by the threads when a lane is all
        decoded, or will never be."""
        self._num_threads = num_threads
        self._on_over = on_over
        self._clock = clock
        self._changed = threading.Condition()
        self._lanes: deque[LaneDecoder] = deque()
        self._in_hand: set[LaneDecoder] = set()
        self._threads: list[threading.Thread] = []
        self._is_closed = False
        self._s_per_byte = 0.0
        self.seconds = 0.0
        """That threads have decoded for."""
        self.nbytes = 0
        """Of KV that was decoded."""

    @property
    def terms(self) -> Decoding:
        with self._changed:
            nbytes = sum(lane.waiting_nbytes for lane in (*self._lanes, *self._in_hand))
            s_per_byte = self._s_per_byte
        queued_s = nbytes * s_per_byte / max(1, self._num_threads)
        return Decoding(list(SUPPORTED), queued_s, s_per_byte * 1e9)

    def add(self, lane: LaneDecoder) -> None:
        with self._changed:
            self._lanes.append(lane)
            if len(self._threads) < min(self._num_threads, len(self._lanes) + len(self._in_hand)):
                thread = threading.Thread(target=self._run, name="decode", daemon=True)
                self._threads.append(thread)
                thread.start()
            self._changed.notify()

    def poll(self) -> None:
        """Without threads: do what there is to do. With them nothing."""
        if self._num_threads:
            return
        for lane in list(self._lanes):
            while self._advance(lane):
                pass
            if lane.is_over:
                self._lanes.remove(lane)

    def close(self) -> None:
        """When this returns no thread writes into blocks."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        num_idle = 0
        while True:
            with self._changed:
                if num_idle > len(self._lanes):
                    self._changed.wait(LOOK_S)
                    num_idle = 0
                while not self._lanes and not self._is_closed:
                    self._changed.wait()
                if self._is_closed:
                    return
                lane = self._lanes.popleft()
                self._in_hand.add(lane)
            num_idle = 0 if self._advance(lane) else num_idle + 1
            is_over = lane.is_over
            with self._changed:
                self._in_hand.discard(lane)
                if not is_over:
                    self._lanes.append(lane)
            if is_over:
                self._on_over()

    def _advance(self, lane: LaneDecoder) -> bool:
        started, before = self._clock(), lane.nbytes
        has_done = lane.advance()
        nbytes, seconds = lane.nbytes - before, self._clock() - started
        if nbytes:
            with self._changed:
                self._s_per_byte = smoothed(self._s_per_byte, seconds / nbytes)
                self.seconds += seconds
                self.nbytes += nbytes
        return has_done
