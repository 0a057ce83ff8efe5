"""One engine's KV events, kept true in one prefix index: the I/O around ``feed_state.py`` (WIRE.md 7).

Owns the SUB socket, and the task that asks for snapshots; ``follow.py`` is the same for engines without any.
The index service and every router run one for each engine; they differ only in how they ask.
"""

from __future__ import annotations

import asyncio
import errno
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import structlog

from microserve.kvcache.prefix.index import PrefixIndex
from microserve.protocol import log
from microserve.protocol.bus.transport import Bus, ClientSocket
from microserve.protocol.errors import MeshError, ProtocolViolation
from microserve.protocol.messages.engine import EngineInfo, SnapshotReply
from microserve.protocol.messages.kv.kv_decoding import decode_batch
from microserve.protocol.messages.kv.kv_events import KVEvent, KVEventBatch, Published, parse_published
from microserve.protocol.process.surviving import surviving
from microserve.services.links.feed_state import (
    Apply,
    AskSnapshot,
    EventBatch,
    FeedCounters,
    FeedState,
    Instruction,
    Replace,
)

_logger = structlog.get_logger()

EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)
"""What passes; other errors are the address's."""
SUBSCRIBE_RETRY_S = 0.5

Events = list[KVEvent]
AskEngine = Callable[[], Awaitable[tuple[SnapshotReply, bytes]]]
"""Asks the engine for a ``Snapshot``: the reply and its bulk frame. Raises a :class:`MeshError`."""


@dataclass(frozen=True, slots=True)
class FeedLag:
    """How far the index is behind the engine."""

    live: bool
    """False: a snapshot is on its way, and what the index says of the engine is out of date."""
    num_buffered: int
    """Batches that wait for the snapshot."""
    silent_s: float
    """Since the last batch or snapshot; an engine sends something every heartbeat interval."""


class Feed(ABC):
    """Feeds ``index`` with what ``info``'s engine holds, from ``start`` to ``close``."""

    def __init__(self, bus: Bus, info: EngineInfo, index: PrefixIndex) -> None:
        self.num_rejected = 0
        """Messages that were no KV events; the gap that they leave is repaired."""
        self.num_skipped = 0
        """Events of types that nobody here knows."""
        self._bus = bus
        self._info = info
        self._index = index
        self._loop = asyncio.get_running_loop()
        self._heard_at = self._loop.time()
        self._socket: ClientSocket | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    @abstractmethod
    def counters(self) -> FeedCounters: ...

    @property
    @abstractmethod
    def lag(self) -> FeedLag: ...

    @abstractmethod
    def _subscribed(self) -> None:
        """Once, behind the subscription: whatever it misses, the answer to what is asked now holds."""

    @abstractmethod
    def _on_batch(self, published: Published, batch: KVEventBatch) -> None: ...

    @abstractmethod
    async def _ask_for_ever(self) -> None: ...

    @abstractmethod
    def _on_unreadable(self, published: Published) -> None:
        """A numbered message whose payload is no batch."""

    def start(self) -> None:
        """Subscribe, then ask for the state: no batch falls between the two. Without a descriptor for it, as
        soon as there is one. Raises ``OSError`` for an address that cannot be one."""
        try:
            self._subscribe()
        except OSError as error:
            if error.errno not in EXHAUSTED:
                raise
            _logger.warning(log.TURN_FAILED, what="subscription to KV events", error=str(error))
        self._task = self._loop.create_task(self._run(), name=f"kv-feed {self._info.engine_id}")

    def _subscribe(self) -> None:
        info = self._info
        self._socket = self._bus.subscriber(info.events_address, self._on_frames, server_key=info.events_key)
        self._subscribed()

    async def _run(self) -> None:
        while self._socket is None:
            await asyncio.sleep(SUBSCRIBE_RETRY_S)
            with surviving("subscription to KV events", engine_id=self._info.engine_id):
                self._subscribe()
        await self._ask_for_ever()

    def close(self) -> None:
        """Stop. What the index knows of the engine stays; see ``PrefixIndex.remove_engine``."""
        if self._socket is not None:
            self._socket.close()
        if self._task is not None:
            self._task.cancel()

    def _on_frames(self, frames: list[bytes]) -> None:
        published = None
        try:
            published = parse_published(frames)
            batch = decode_batch(published.payload)
        except ProtocolViolation as violation:
            self.num_rejected += 1
            _logger.warning(log.FRAME_REJECTED, engine_id=self._info.engine_id, error=violation.detail)
            if published is not None:
                self._on_unreadable(published)
            return
        self._heard_at = self._loop.time()
        self.num_skipped += batch.num_skipped
        self._on_batch(published, batch)


class KvFeed(Feed):
    """Of an engine that says what it holds as a whole: by snapshots."""

    def __init__(self, bus: Bus, info: EngineInfo, index: PrefixIndex, snapshot: AskEngine) -> None:
        super().__init__(bus, info, index)
        self._snapshot = snapshot
        self._state: FeedState[Events] = FeedState()
        self._last_seq = 0
        """Of a batch that names no epoch."""
        self._asks: asyncio.Queue[AskSnapshot] = asyncio.Queue()  # one at most: FeedState asks one by one

    @property
    def counters(self) -> FeedCounters:
        return self._state.counters

    @property
    def lag(self) -> FeedLag:
        silent_s = self._loop.time() - self._heard_at
        return FeedLag(self._state.live, self._state.num_buffered, silent_s)

    def _subscribed(self) -> None:
        self._obey(self._state.start(self._loop.time()))

    def _on_batch(self, published: Published, batch: KVEventBatch) -> None:
        epoch = batch.epoch
        if epoch is None:  # it has the life that the last snapshot was of, as long as its numbers only grow
            epoch = self._info.incarnation if self._state.epoch is None else self._state.epoch
            if published.seq < self._last_seq:
                self._obey(self._state.doubt(self._heard_at))
            self._last_seq = published.seq
        self._obey(self._state.receive(EventBatch(epoch, published.seq, batch.events), self._heard_at))

    def _on_unreadable(self, published: Published) -> None:
        """A snapshot will hold what it said."""

    def _obey(self, instructions: list[Instruction[Events]]) -> None:
        for instruction in instructions:
            match instruction:
                case Apply(events):
                    self._index.apply(self._info.engine_id, events)
                case Replace(epoch, events):
                    self._index.replace(self._info.engine_id, events)
                    _logger.info(log.INDEX_RESYNCED, engine_id=self._info.engine_id, epoch=epoch)
                case AskSnapshot():
                    self._asks.put_nowait(instruction)

    async def _ask_for_ever(self) -> None:
        while True:
            ask = await self._asks.get()
            await asyncio.sleep(ask.delay_s)
            self._state.asking(ask.ticket)
            try:
                reply, bulk = await self._snapshot()
                events = decode_batch(bulk).events
            except (MeshError, OSError) as error:  # or no socket to ask by
                _logger.info(log.INDEX_RESYNC_FAILED, engine_id=self._info.engine_id, error=str(error))
                self._obey(self._state.snapshot_failed(ask.ticket, self._loop.time()))
                continue
            except Exception:
                # A feed must outlive whatever one attempt ran into: nobody would notice that it ended.
                _logger.exception(log.BUS_HANDLER_FAILED, engine_id=self._info.engine_id)
                self._obey(self._state.snapshot_failed(ask.ticket, self._loop.time()))
                continue
            now = self._heard_at = self._loop.time()
            self._obey(self._state.snapshot(ask.ticket, EventBatch(reply.epoch, reply.seq, events), now))
