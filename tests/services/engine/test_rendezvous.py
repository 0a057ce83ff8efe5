"""Engines that meet at the index, over real sockets with CURVE."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import structlog

from microserve.protocol.bus.codec import INDEX_REPLY, INDEX_REQUEST
from microserve.protocol.bus.curve import CurveKeys, create_keys
from microserve.protocol.bus.transport import Bus, ClientSocket, ZmqBus
from microserve.protocol.errors import ConfigError, InvalidRequest, ProtocolViolation
from microserve.protocol.messages.index import IndexFailed
from microserve.protocol.messages.world import JoinWorld, WorldJoined, WorldRank, WorldWaiting
from microserve.protocol.settings.settings import BusSettings
from microserve.services.engine.rendezvous import Rendezvous
from microserve.services.index.service import IndexService
from tests.support.index.index_world import until

SECRET = b"\x00the capability\xff" * 8


class Meeting:
    """An index, and a bus for each engine, as each is a process of its own."""

    def __init__(self, directory: Path) -> None:
        self.keys = create_keys(directory / "keys")
        self.buses: list[ZmqBus] = []
        self.index: IndexService | None = None
        self.address = f"ipc://{directory}/index"

    def bus(self, keys: CurveKeys | None) -> ZmqBus:
        self.buses.append(ZmqBus(linger_s=0.1, keys=keys))
        return self.buses[-1]

    def start_index(self, *, has_keys: bool = True, liveness: int = 100) -> IndexService:
        self.index = IndexService(
            self.bus(self.keys if has_keys else None),
            address=self.address,
            settings=BusSettings(heartbeat_interval_s=0.05, liveness=liveness),
            max_nbytes=1 << 20,
            incarnation=7,
        )
        return self.index

    def rank(
        self, rank: int, life: int, num_ranks: int = 2, *, bus: Bus | None = None, liveness: int = 10
    ) -> Rendezvous:
        call = JoinWorld(1, "w", rank, num_ranks, WorldRank(life, "here", 5), b"" if rank else SECRET)
        return Rendezvous(
            bus or self.bus(self.keys), self.address, call, heartbeat_interval_s=0.05, liveness=liveness
        )

    def close(self) -> None:
        if self.index is not None:
            self.index.close()
        for bus in self.buses:
            bus.close()


@asynccontextmanager
async def _open(directory: Path) -> AsyncIterator[Meeting]:
    meeting = Meeting(directory)
    try:
        async with asyncio.timeout(30):
            yield meeting
    finally:
        meeting.close()


def at_the_index(tmp_path: Path, test: Callable[[Meeting], Awaitable[None]]) -> None:
    async def run() -> None:
        async with _open(tmp_path) as meeting:
            await test(meeting)

    asyncio.run(run())


def test_ranks_in_any_order_get_one_id(tmp_path: Path) -> None:
    async def test(meeting: Meeting) -> None:
        meeting.start_index()
        ranks = [meeting.rank(number, 10 + number, 3) for number in (2, 0, 1)]
        answers = await asyncio.gather(*(each.meet() for each in ranks))
        assert {each.unique_id for each in answers} == {SECRET}
        assert [[who.incarnation for who in each.ranks] for each in answers] == [[10, 11, 12]] * 3

    with structlog.testing.capture_logs() as logs:
        at_the_index(tmp_path, test)
    assert "capability" not in repr(logs)


def test_ranks_that_come_before_the_index_meet_when_it_is_there(tmp_path: Path) -> None:
    async def test(meeting: Meeting) -> None:
        ranks = [meeting.rank(number, 10 + number) for number in (0, 1)]
        waiting = [asyncio.create_task(each.meet()) for each in ranks]
        await asyncio.sleep(0)
        assert not any(each.has_heard for each in ranks)
        meeting.start_index()
        assert [each.unique_id for each in await asyncio.gather(*waiting)] == [SECRET, SECRET]

    at_the_index(tmp_path, test)


def test_ranks_that_wait_outlive_their_index(tmp_path: Path) -> None:
    async def test(meeting: Meeting) -> None:
        index = meeting.start_index()
        first = meeting.rank(1, 11)
        waiting = asyncio.create_task(first.meet())
        await until(lambda: index.worlds.num_waiting == 1)
        index.close()
        assert meeting.start_index().worlds.num_waiting == 0
        answer = await meeting.rank(0, 10).meet()
        assert answer == await waiting

    at_the_index(tmp_path, test)


def test_an_index_that_comes_late_hears_of_no_connection_that_was_given_up(tmp_path: Path) -> None:
    """It would answer there, to nobody, and the other ranks would wait for this one inside of the library."""

    async def test(meeting: Meeting) -> None:
        opened, heard = 0, Counter[bytes]()
        bus = ZmqBus(linger_s=30, keys=meeting.keys)
        meeting.buses.append(bus)
        client = bus.client

        def count(*args: Any, **options: Any) -> ClientSocket:
            nonlocal opened
            opened += 1
            return client(*args, **options)

        bus.client = count  # type: ignore[method-assign]
        waiting = asyncio.create_task(meeting.rank(0, 10, bus=bus, liveness=2).meet())
        await until(lambda: opened > 3)
        num_given_up = opened - 1

        def listen(peer: bytes, frames: list[bytes]) -> None:
            heard[peer] += 1
            index.send(peer, INDEX_REPLY.encode(WorldWaiting("w", [0])))

        index = meeting.bus(meeting.keys).server(meeting.address, listen)
        # More than any connection but the last one can have been given to say.
        await until(lambda: max(heard.values(), default=0) > 10)
        waiting.cancel()
        await asyncio.wait([waiting])
        assert len(heard) <= opened - num_given_up

    at_the_index(tmp_path, test)


def test_a_rank_that_gives_up_has_left_at_once(tmp_path: Path) -> None:
    async def test(meeting: Meeting) -> None:
        index = meeting.start_index()
        gives_up = meeting.rank(0, 10)
        waiting = asyncio.create_task(gives_up.meet())
        await until(lambda: gives_up.present == [0])
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        # Liveness is 5 s here: the connection itself tells, as soon as the index has seen its end.
        second = await _until_taken(lambda: meeting.rank(0, 20))
        other = asyncio.create_task(meeting.rank(1, 11).meet())
        assert [who.incarnation for who in (await second).ranks] == [20, 11]
        assert (await other).unique_id == SECRET
        assert index.worlds.num_waiting == 0

    at_the_index(tmp_path, test)


def test_a_rank_that_falls_silent_on_a_living_connection_has_left(tmp_path: Path) -> None:
    async def test(meeting: Meeting) -> None:
        index = meeting.start_index(liveness=2)
        silent = meeting.bus(meeting.keys).client(meeting.address, lambda frames: None)
        silent.send(INDEX_REQUEST.encode(JoinWorld(1, "w", 0, 2, WorldRank(10, "here", 5), SECRET)))
        await until(lambda: index.worlds.num_waiting == 1)

        def has_left() -> bool:
            index.tick()
            return index.worlds.num_waiting == 0

        await until(has_left)

    at_the_index(tmp_path, test)


async def _until_taken(make: Callable[[], Rendezvous]) -> asyncio.Task[WorldJoined]:
    """A rank whose place is still another's is refused, and tries again, as a supervisor lets it."""
    while True:
        rank = make()
        task = asyncio.create_task(rank.meet())
        await until(lambda rank=rank, task=task: bool(rank.present) or task.done())  # type: ignore[misc]
        if not task.done():
            return task
        assert isinstance(task.exception(), InvalidRequest)


def test_a_second_engine_of_the_rank_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    async def test(meeting: Meeting) -> None:
        meeting.start_index()
        first = meeting.rank(0, 10)
        waiting = asyncio.create_task(first.meet())
        await until(lambda: first.present == [0])
        with pytest.raises(InvalidRequest, match="two living engines, 0xa and 0x14") as caught:
            await meeting.rank(0, 20).meet()
        assert caught.value.field == "rank"
        with pytest.raises(InvalidRequest, match="of 2 ranks, rank 1 says 3"):
            await meeting.rank(1, 11, 3).meet()
        await meeting.rank(1, 11).meet()
        assert (await waiting).unique_id == SECRET

    at_the_index(tmp_path, test)


def test_an_index_without_keys_refuses(tmp_path: Path) -> None:
    async def test(meeting: Meeting) -> None:
        index = meeting.start_index(has_keys=False)
        with pytest.raises(ConfigError, match="authenticated sockets only") as caught:
            await meeting.rank(0, 10, bus=meeting.bus(None)).meet()
        assert caught.value.field == "bus.curve_dir"
        assert index.worlds.num_waiting == 0

    at_the_index(tmp_path, test)


def test_an_index_that_does_not_know_worlds_is_an_error_and_no_endless_wait(tmp_path: Path) -> None:
    async def test(meeting: Meeting) -> None:
        bus = meeting.bus(meeting.keys)
        # What an index says of a tag that it does not know (WIRE.md 2.2).
        answer = INDEX_REPLY.encode(IndexFailed(0, "protocol_violation", "TO_INDEX: Invalid value 10"))

        def refuse(peer: bytes, frames: list[bytes]) -> None:
            older.send(peer, answer)

        older = bus.server(meeting.address, refuse)
        with pytest.raises(ProtocolViolation):
            await meeting.rank(0, 10).meet()

    at_the_index(tmp_path, test)
