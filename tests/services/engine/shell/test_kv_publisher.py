"""An engine's events on the wire: numbered, kept, replayed."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from microserve.protocol.messages.kv.kv_decoding import decode_batch
from microserve.protocol.messages.kv.kv_events import (
    AllBlocksCleared,
    BlockRemoved,
    Published,
    encode_batch,
    parse_published,
    parse_replay_answer,
    replay_request,
)
from microserve.services.engine.shell import kv_publisher as module
from microserve.services.engine.shell.kv_publisher import KvPublisher
from tests.support.index.index_world import ANY, World, in_world

EPOCH = 77


def make_publisher(world: World, **limits: Any) -> KvPublisher:
    publisher = KvPublisher(
        world.bus,
        events_address=ANY,
        replay_address=ANY,
        topic="kv@e1",
        epoch=EPOCH,
        clock=lambda: 12.5,
        **limits,
    )
    world.at_end(publisher.close)
    return publisher


class Subscriber:
    """Everything that a late-joining reader got, once it is sure to be joined."""

    def __init__(self, world: World, publisher: KvPublisher) -> None:
        self._world, self._publisher = world, publisher
        self.received: list[Published] = []
        world.bus.subscriber(publisher.address, lambda frames: self.received.append(parse_published(frames)))

    async def join(self) -> None:
        """Returns with nothing received; a slow joiner misses what is sent before."""

        def heard() -> bool:
            self._publisher.publish([AllBlocksCleared()])
            return bool(self.received)

        await self._world.until(heard)
        sent = self._publisher.next_seq
        await self._world.until(lambda: self.received[-1].seq == sent - 1)
        self.received.clear()


async def replay(world: World, publisher: KvPublisher, start_seq: int) -> list[Published]:
    """All answers to one request, in order, without the end marker."""
    answers: list[Published | None] = []
    client = world.bus.client(
        publisher.replay_address, lambda frames: answers.append(parse_replay_answer(frames))
    )
    client.send(replay_request(start_seq))
    await world.until(lambda: None in answers)
    client.close()
    assert answers.index(None) == len(answers) - 1
    return [answer for answer in answers if answer is not None]


def test_sequence_starts_at_zero_and_every_batch_names_topic_epoch_and_time() -> None:
    async def test(world: World) -> None:
        publisher = make_publisher(world)
        assert publisher.next_seq == 1
        subscriber = Subscriber(world, publisher)
        await subscriber.join()
        first = publisher.next_seq

        publisher.publish([BlockRemoved([1]), AllBlocksCleared()])
        publisher.publish([BlockRemoved([2])])
        await world.until(lambda: len(subscriber.received) == 2)

        assert [p.topic for p in subscriber.received] == ["kv@e1", "kv@e1"]
        assert [p.seq for p in subscriber.received] == [first, first + 1]
        batch = decode_batch(subscriber.received[0].payload)
        assert (batch.ts, batch.data_parallel_rank, batch.epoch) == (12.5, None, EPOCH)
        assert batch.events == [BlockRemoved([1]), AllBlocksCleared()]

    in_world(test)


def test_a_life_begins_with_a_batch_that_clears_what_was_known_of_the_one_before() -> None:
    async def test(world: World) -> None:
        publisher = make_publisher(world)

        [answer] = await replay(world, publisher, 0)

        batch = decode_batch(answer.payload)
        assert (answer.seq, batch.epoch, batch.events) == (0, EPOCH, [AllBlocksCleared()])

    in_world(test)


def test_a_heartbeat_is_the_last_batch_once_more_and_a_busy_engine_sends_none() -> None:
    async def test(world: World) -> None:
        publisher = make_publisher(world)
        subscriber = Subscriber(world, publisher)
        await subscriber.join()
        publisher.publish([BlockRemoved([1])])
        publisher.beat()
        await world.until(lambda: len(subscriber.received) == 1)
        publisher.beat()
        publisher.beat()
        await world.until(lambda: len(subscriber.received) == 3)

        assert subscriber.received == [subscriber.received[0]] * 3
        assert publisher.counters.repeated == 2

    in_world(test)


def test_an_engine_that_idles_for_a_day_keeps_its_events() -> None:
    async def test(world: World) -> None:
        publisher = make_publisher(world)
        publisher.publish([BlockRemoved([1])])
        for _ in range(module.MAX_RING_BATCHES + 20):
            publisher.beat()

        assert [a.seq for a in await replay(world, publisher, 0)] == [0, 1]

    in_world(test)


@pytest.mark.parametrize("is_kept", [True, False])
def test_a_heartbeat_behind_a_long_batch_is_short(is_kept: bool) -> None:
    async def test(world: World) -> None:
        publisher = make_publisher(world, **({} if is_kept else {"max_ring_nbytes": 5000}))
        subscriber = Subscriber(world, publisher)
        await subscriber.join()
        publisher.publish([BlockRemoved([b"x" * 64] * 100)])
        for _ in range(4):
            publisher.beat()
        await world.until(lambda: len(subscriber.received) == 4)

        long, *short = subscriber.received
        assert len(long.payload) > 5000 > len(short[0].payload)
        assert short == [short[0]] * 3
        assert short[0].seq == long.seq + 1
        batch = decode_batch(short[0].payload)
        assert (batch.events, batch.epoch) == ([BlockRemoved([])], EPOCH)

    in_world(test)


def test_nothing_to_say_is_not_said() -> None:
    async def test(world: World) -> None:
        publisher = make_publisher(world)
        publisher.publish([])
        assert publisher.next_seq == 1

    in_world(test)


@pytest.mark.parametrize(("start", "expected"), [(0, [0, 1, 2, 3, 4]), (3, [3, 4]), (5, []), (99, [])])
def test_replay_from_a_sequence_to_the_end(start: int, expected: list[int]) -> None:
    async def test(world: World) -> None:
        publisher = make_publisher(world)
        for i in range(1, 5):
            publisher.publish([BlockRemoved([i])])

        answers = await replay(world, publisher, start)

        assert [a.seq for a in answers] == expected
        assert {a.topic for a in answers} <= {"kv@e1"}
        said = [[AllBlocksCleared()], *([BlockRemoved([i])] for i in range(1, 5))]
        assert [decode_batch(a.payload).events for a in answers] == [said[i] for i in expected]

    in_world(test)


def test_frames_of_a_replay_are_vllms() -> None:
    async def test(world: World) -> None:
        publisher = make_publisher(world)
        received: list[list[bytes]] = []
        client = world.bus.client(publisher.replay_address, received.append)
        client.send([b"", (0).to_bytes(8, "big")])
        await world.until(lambda: len(received) == 2)

        assert received[0][:3] == [b"", b"kv@e1", bytes(8)]
        assert received[1] == [b"", b"", b"\xff" * 8, b""]

    in_world(test)


def test_ring_is_bounded_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_RING_BATCHES", 3)

    async def test(world: World) -> None:
        publisher = make_publisher(world)
        for i in range(10):
            publisher.publish([BlockRemoved([i])])
        assert [a.seq for a in await replay(world, publisher, 0)] == [8, 9, 10]

    in_world(test)


def test_ring_is_bounded_in_bytes_down_to_nothing() -> None:
    async def test(world: World) -> None:
        publisher = make_publisher(world, max_ring_nbytes=2500)
        for _ in range(4):
            publisher.publish([BlockRemoved([b"x" * 1000])])
        assert [a.seq for a in await replay(world, publisher, 0)] == [3, 4]

        publisher.publish([BlockRemoved([b"x" * 5000])])
        assert await replay(world, publisher, 0) == []
        assert publisher.next_seq == 6

    in_world(test)


def test_long_replay_is_answered_whole_while_publishing_goes_on() -> None:
    async def test(world: World) -> None:
        publisher = make_publisher(world)
        for i in range(3000):
            publisher.publish([BlockRemoved([i])])
        answering = asyncio.ensure_future(replay(world, publisher, 0))
        await world.until(lambda: publisher.counters.replays == 1)
        for i in range(5):
            publisher.publish([BlockRemoved([i])])
        answers = await answering

        assert [a.seq for a in answers] == list(range(3006))

    in_world(test)


@pytest.mark.parametrize(
    "junk", [[], [b""], [b"", b"short"], [b"x", bytes(8)], [b"", b"\xff" * 8], [b"", bytes(8), b"more"]]
)
def test_malformed_request_is_dropped_and_counted(junk: list[bytes]) -> None:
    async def test(world: World) -> None:
        publisher = make_publisher(world)
        client = world.bus.client(publisher.replay_address, lambda frames: None)
        client.send(junk or [b"not a request"])
        await world.until(lambda: publisher.counters.requests_rejected == 1)

        assert [a.seq for a in await replay(world, publisher, 0)] == [0]
        assert publisher.counters.replays == 1

    in_world(test)


def test_peer_that_takes_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_REPLAY_REFUSALS", 2)
    monkeypatch.setattr(module, "REPLAY_RETRY_S", 0.001)

    async def test(world: World) -> None:
        publisher = make_publisher(world)
        publisher._on_request(b"never connected", replay_request(0))
        await world.until(lambda: publisher.counters.replays_given_up == 1)

        assert [a.seq for a in await replay(world, publisher, 0)] == [0]

    in_world(test)


def test_number_of_replays_at_a_time_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_REPLAYS", 2)

    async def test(world: World) -> None:
        publisher = make_publisher(world)
        for name in (b"a", b"b", b"c", b"a"):
            publisher._on_request(name, replay_request(0))

        assert publisher.counters.replays == 3
        assert publisher.counters.requests_rejected == 1

    in_world(test)


def test_a_peer_that_asks_again_at_once_waits_and_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REPLAY_INTERVAL_S", 0.05)

    async def test(world: World) -> None:
        publisher = make_publisher(world)
        began: list[float] = []
        loop = asyncio.get_running_loop()

        def take(frames: list[bytes]) -> None:
            if parse_replay_answer(frames) is None:
                began.append(loop.time())
                client.send(replay_request(0))

        client = world.bus.client(publisher.replay_address, take)
        client.send(replay_request(0))
        await world.until(lambda: len(began) == 4)

        times = list(publisher._began.values())
        assert len(times) == 1  # of one peer, the last
        assert began[3] - began[0] >= 2 * 0.05

    in_world(test)


def test_answers_of_a_second_are_bounded_for_all_peers_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_REPLAYS", 2)
    monkeypatch.setattr(module, "REPLAY_INTERVAL_S", 60.0)

    async def test(world: World) -> None:
        publisher = make_publisher(world)
        await replay(world, publisher, 0)
        await replay(world, publisher, 0)
        publisher._on_request(b"third", replay_request(0))
        await asyncio.sleep(0)

        [waiting] = publisher._replays.values()
        assert waiting.begins_at > asyncio.get_running_loop().time()

    in_world(test)


def test_address_that_is_taken_leaves_nothing_open() -> None:
    async def test(world: World) -> None:
        taken = make_publisher(world)
        with pytest.raises(OSError, match="cannot bind"):
            KvPublisher(
                world.bus,
                events_address=ANY,
                replay_address=taken.replay_address,
                topic="t",
                epoch=1,
                clock=lambda: 0.0,
            )

    in_world(test)


def test_payload_is_a_kv_event_batch() -> None:
    async def test(world: World) -> None:
        publisher = make_publisher(world)
        publisher.publish([BlockRemoved([bytes(range(16)), bytes(16)]), AllBlocksCleared()])
        [_, answer] = await replay(world, publisher, 0)
        assert encode_batch(decode_batch(answer.payload)) == answer.payload

    in_world(test)
