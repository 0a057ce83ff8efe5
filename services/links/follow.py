"""KV events of an engine without snapshots, kept true in a prefix index: the I/O around ``follow_state.py``.

Owns the DEALER to the engine's replay socket, made anew whenever an answer did not come whole, lest its rest
be taken for the next one's.
"""

from __future__ import annotations

import asyncio
import contextlib
from hashlib import blake2b

import structlog

from microserve.kvcache.prefix.index import PrefixIndex
from microserve.protocol import log
from microserve.protocol.bus.transport import Bus, ClientSocket
from microserve.protocol.errors import ProtocolViolation
from microserve.protocol.messages.engine_info import SNAPSHOT, EngineInfo
from microserve.protocol.messages.kv.kv_decoding import decode_batch
from microserve.protocol.messages.kv.kv_events import (
    AllBlocksCleared,
    KVEventBatch,
    Published,
    parse_replay_answer,
    replay_request,
)
from microserve.services.links.feed import AskEngine, Events, Feed, FeedLag, KvFeed
from microserve.services.links.feed_state import Apply, FeedCounters, Replace
from microserve.services.links.follow_state import AskReplay, FollowState, MarkedBatch, Step

POLL_S = 2.0
"""Between two looks whether the engine lives and nothing was lost: it says nothing while it idles."""
REPLAY_TIMEOUT_S = 5.0
"""Without a word of an answer."""
MAX_REPLAYED_NBYTES = 256 << 20
_BATCH_NBYTES = 512
"""What a batch takes here beside its payload, about."""

_logger = structlog.get_logger()


def feed_of(bus: Bus, info: EngineInfo, index: PrefixIndex, snapshot: AskEngine) -> Feed:
    """The feed that fits the engine; ``snapshot`` is asked if it has any."""
    if info.does(SNAPSHOT) and not info.only_publishes:
        return KvFeed(bus, info, index, snapshot)
    return KvFollower(bus, info, index)


class _Answer:
    """To one question, as it comes."""

    def __init__(self) -> None:
        self.batches: list[MarkedBatch[Events]] = []
        self.ended = asyncio.Event()
        self.is_whole = False
        self.nbytes = 0


class KvFollower(Feed):
    """Feeds ``index`` with what ``info``'s engine holds, by its events and their replay."""

    def __init__(self, bus: Bus, info: EngineInfo, index: PrefixIndex) -> None:
        super().__init__(bus, info, index)
        self._state: FollowState[Events] = FollowState([], is_blind=not info.replay_address)
        self._asks: asyncio.Queue[AskReplay] = asyncio.Queue()  # one at most: FollowState asks one by one
        self._answer: _Answer | None = None
        self._dealer: ClientSocket | None = None

    @property
    def counters(self) -> FeedCounters:
        return self._state.counters

    @property
    def lag(self) -> FeedLag:
        silent_s = self._loop.time() - self._heard_at
        return FeedLag(self._state.live, self._state.num_buffered, silent_s)

    def close(self) -> None:
        super().close()
        self._hang_up()

    def _subscribed(self) -> None:
        self._obey(self._state.start(self._loop.time()))

    def _on_batch(self, published: Published, batch: KVEventBatch) -> None:
        self._obey(self._state.receive(_marked(published, batch.events), self._heard_at))

    def _on_unreadable(self, published: Published) -> None:
        # It may have said what is gone, and would be as unreadable in a replay: nothing is known any more.
        self._obey(self._state.receive(_marked(published, [AllBlocksCleared()]), self._loop.time()))

    def _obey(self, steps: list[Step[Events]]) -> None:
        for step in steps:
            match step:
                case Apply(events):
                    self._index.apply(self._info.engine_id, events)
                case Replace(_, events):
                    self._index.replace(self._info.engine_id, events)
                    _logger.info(log.INDEX_RESYNCED, engine_id=self._info.engine_id)
                case AskReplay():
                    self._asks.put_nowait(step)

    async def _ask_for_ever(self) -> None:
        while True:
            try:
                async with asyncio.timeout(POLL_S):
                    ask = await self._asks.get()
            except TimeoutError:
                self._obey(self._state.poll(self._loop.time()))
                continue
            await asyncio.sleep(ask.delay_s)
            answer = None
            try:
                answer = await self._replay(ask)
            except OSError as error:  # no socket to ask by
                _logger.info(log.INDEX_RESYNC_FAILED, engine_id=self._info.engine_id, error=str(error))
            except Exception:  # a feed must outlive whatever one attempt ran into
                _logger.exception(log.BUS_HANDLER_FAILED, engine_id=self._info.engine_id)
            now = self._loop.time()
            if answer is not None:
                self._heard_at = now
                self._obey(self._state.replayed(ask.ticket, answer, now))
                continue
            self._hang_up()
            self._obey(self._state.replay_failed(ask.ticket, now))

    async def _replay(self, ask: AskReplay) -> list[MarkedBatch[Events]] | None:
        """None: no answer, or not all of it."""
        if self._dealer is None:
            self._dealer = self._bus.client(
                self._info.replay_address,
                self._on_answer,
                server_key=self._info.events_key,
                on_disconnect=self._on_disconnect,
            )
        answer = self._answer = _Answer()
        self._state.asking(ask.ticket)
        self._dealer.send(replay_request(ask.start_seq))
        seen = -1
        while not answer.ended.is_set() and len(answer.batches) > seen:
            seen = len(answer.batches)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REPLAY_TIMEOUT_S):
                    await answer.ended.wait()
        self._answer = None
        return answer.batches if answer.is_whole else None

    def _on_answer(self, frames: list[bytes]) -> None:
        answer = self._answer
        if answer is None or answer.ended.is_set():
            return
        try:
            published = parse_replay_answer(frames)
        except ProtocolViolation as violation:
            self.num_rejected += 1
            _logger.warning(log.FRAME_REJECTED, engine_id=self._info.engine_id, error=violation.detail)
            answer.ended.set()
            return
        if published is None:
            answer.is_whole = True
            answer.ended.set()
            return
        answer.nbytes += len(published.payload) + _BATCH_NBYTES
        if answer.nbytes > MAX_REPLAYED_NBYTES:
            answer.ended.set()
            return
        answer.batches.append(self._read(published))

    def _read(self, published: Published) -> MarkedBatch[Events]:
        try:
            batch = decode_batch(published.payload)
        except ProtocolViolation:
            self.num_rejected += 1
            return _marked(published, [AllBlocksCleared()])
        self.num_skipped += batch.num_skipped
        return _marked(published, batch.events)

    def _on_disconnect(self) -> None:
        if self._answer is not None:
            self._answer.ended.set()
        self._obey(self._state.lost(self._loop.time()))

    def _hang_up(self) -> None:
        if self._dealer is not None:
            self._dealer.close(lingers=False)
            self._dealer = None


def _marked(published: Published, events: Events) -> MarkedBatch[Events]:
    return MarkedBatch(published.seq, blake2b(published.payload, digest_size=16).digest(), events)
