"""vLLM's events in order and without a gap, over real sockets: a publisher that drops, and its replay."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from microserve.protocol.bus.transport import ZmqBus
from microserve.protocol.messages.kv.kv_events import (
    BlockRemoved,
    KVEventBatch,
    encode_batch,
    parse_replay_request,
    publish_frames,
    replay_answer,
    replay_end,
)
from microserve.services.engine.vllm.feed import Feed

pytestmark = pytest.mark.slow


class Publisher:
    """As vLLM's: what it has published is kept for who asks."""

    def __init__(self, bus: ZmqBus, feed: Feed) -> None:
        self.kept: list[bytes] = []
        self.num_asked = 0
        self._events = bus.publisher(feed.endpoint)
        self._replay = bus.server(feed.replay_endpoint, self._asked)

    def publish(self, *, is_lost: bool = False) -> None:
        seq = len(self.kept)
        payload = encode_batch(KVEventBatch(0.0, [BlockRemoved([seq])]))
        self.kept.append(payload)
        if not is_lost:
            self._events.send(publish_frames("", seq, payload))

    def _asked(self, peer: bytes, frames: list[bytes]) -> None:
        self.num_asked += 1
        _, start = parse_replay_request([peer, *frames])
        for seq in range(start, len(self.kept)):
            self._replay.send(peer, replay_answer(peer, "", seq, self.kept[seq])[1:])
        self._replay.send(peer, replay_end(peer)[1:])


def test_what_was_dropped_is_asked_for_and_comes_in_order(tmp_path: Path) -> None:
    taken: list[int | bytes] = []

    async def until(num_taken: int) -> None:
        async with asyncio.timeout(30):
            while len(taken) < num_taken:
                grown.clear()
                await grown.wait()

    async def follow() -> None:
        feed, bus = Feed(tmp_path), ZmqBus(linger_s=0.0)
        try:
            publisher = Publisher(bus, feed)
            publisher.publish()
            publisher.publish()  # nobody has subscribed: both are dropped
            feed.open(
                lambda batch: taken.extend(name for event in batch.events for name in event.block_hashes),  # type: ignore[union-attr]
                grown.set,
            )
            await until(2)
            publisher.publish(is_lost=True)
            publisher.publish(is_lost=True)
            num_asked = publisher.num_asked
            async with asyncio.timeout(30):
                while len(taken) < 5:  # a batch behind the gap shows it, once the subscription stands
                    publisher.publish()
                    await asyncio.sleep(0.01)
            assert publisher.num_asked > num_asked
            assert taken == sorted(taken, key=int), "each once, in order"
            assert taken == list(range(len(taken)))
        finally:
            feed.close()
            bus.close()

    grown = asyncio.Event()
    asyncio.run(follow())
