"""vLLM's KV events, in order and without a gap, from its publisher to the mirror.

    EngineCore ── PUB [topic][seq][batch] ──> Feed ──> Mirror
               <─ ROUTER: replay from a sequence number ──

A PUB socket drops what was published before its reader had joined: what is missing is asked for again, at the
start and at each gap. Both sockets are in a directory that only this user may enter.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import structlog

from microserve.protocol import log
from microserve.protocol.bus.transport import ZmqBus
from microserve.protocol.errors import ProtocolViolation
from microserve.protocol.messages.kv.kv_decoding import decode_batch
from microserve.protocol.messages.kv.kv_events import (
    KVEventBatch,
    Published,
    parse_published,
    parse_replay_answer,
    replay_request,
)

ASK_AGAIN_S = 0.5
"""A replay that is not answered is asked for again."""

_logger = structlog.get_logger()


class Feed:
    """Made in the loop before vLLM starts; ``open`` when it has."""

    def __init__(self, directory: Path) -> None:
        """``directory``: for the two sockets, and removed by whom it is of."""
        self.endpoint = f"ipc://{directory}/events"
        self.replay_endpoint = f"ipc://{directory}/replay"
        self._take: Callable[[KVEventBatch], None] = lambda batch: None
        self._on_change: Callable[[], None] = lambda: None
        self._next_seq = 0
        self._early: dict[int, bytes] = {}
        """Batches behind a gap."""
        self._loop = asyncio.get_running_loop()
        self._bus = ZmqBus(linger_s=0.0)
        self._asking: asyncio.TimerHandle | None = None

    def open(self, take: Callable[[KVEventBatch], None], on_change: Callable[[], None]) -> None:
        """``take`` is called with each batch, in order; ``on_change`` after some."""
        self._take, self._on_change = take, on_change
        self._events = self._bus.subscriber(self.endpoint, self._on_published)
        self._replays = self._bus.client(self.replay_endpoint, self._on_replayed)
        self._ask()

    @property
    def next_seq(self) -> int:
        """Batches below it are in the mirror."""
        return self._next_seq

    def _ask(self) -> None:
        """For what is missing, until the gap is closed."""
        self._replays.send(replay_request(self._next_seq))
        self._asking = self._loop.call_later(ASK_AGAIN_S, self._ask)

    def _on_published(self, frames: list[bytes]) -> None:
        try:
            self._put(parse_published(frames))
        except ProtocolViolation as violation:  # the gap shows it
            _logger.warning(log.FRAME_REJECTED, socket="events of vLLM", error=violation.detail)

    def _on_replayed(self, frames: list[bytes]) -> None:
        try:
            published = parse_replay_answer(frames)
            if published is not None:
                self._put(published)
            elif self._asking is not None and not self._early:
                self._asking.cancel()
                self._asking = None
        except ProtocolViolation as violation:
            _logger.warning(log.FRAME_REJECTED, socket="replay of vLLM", error=violation.detail)

    def _put(self, published: Published) -> None:
        if published.seq < self._next_seq:
            return
        self._early[published.seq] = published.payload
        is_changed = False
        while (payload := self._early.pop(self._next_seq, None)) is not None:
            self._take(decode_batch(payload))
            self._next_seq += 1
            is_changed = True
        if self._early and self._asking is None:
            self._ask()
        if is_changed:
            self._on_change()

    def close(self) -> None:
        if self._asking is not None:
            self._asking.cancel()
        self._bus.close()
