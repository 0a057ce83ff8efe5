"""The pace of a process: slow when nothing has happened for a while, and never asleep over news."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from microserve.protocol.bus.peers import Peers
from microserve.protocol.process.pace import CALM_SILENCES, IDLE_INTERVALS, Pace, idle_interval
from microserve.protocol.process.tick import between_signs
from microserve.services.simulation.loop import VirtualLoop

INTERVAL_S, LIVENESS = 0.25, 6
CALM_S = CALM_SILENCES * INTERVAL_S * LIVENESS
IDLE_S = IDLE_INTERVALS * INTERVAL_S
AWAKE_S = 2 * INTERVAL_S


def in_virtual_time(test: Callable[[VirtualLoop], Awaitable[None]]) -> None:
    loop = VirtualLoop()

    async def run() -> None:
        await test(loop)

    loop.run(run())


def test_idle_is_who_has_had_nothing_to_do_for_a_while() -> None:
    async def test(loop: VirtualLoop) -> None:
        work = [1]
        pace = Pace(INTERVAL_S, LIVENESS, lambda: bool(work))
        await asyncio.sleep(100)
        assert pace.next_s == 0.0
        work.clear()
        await asyncio.sleep(CALM_S - 0.01)
        assert pace.next_s == 0.0
        await asyncio.sleep(0.02)
        assert pace.next_s == IDLE_S
        pace.stir()
        assert pace.next_s == 0.0

    in_virtual_time(test)


@pytest.mark.parametrize("liveness", [1, 5, 24, 100_000], ids=["one", "few", "rare", "undying"])
def test_where_signs_are_few_or_rare_anyway_nobody_is_idle(liveness: int) -> None:
    async def test(loop: VirtualLoop) -> None:
        pace = Pace(INTERVAL_S, liveness, lambda: False, calm_s=0.0)
        await asyncio.sleep(100)
        assert pace.next_s == 0.0

    in_virtual_time(test)
    assert idle_interval(INTERVAL_S, liveness) == 0.0


@pytest.mark.parametrize("interval_s", [0.01, 0.25, 1.3, 2.0, 3.3, 5.0, 60.0])
@pytest.mark.parametrize("liveness", [6, 7, 12, 23])
def test_nobody_is_silent_for_longer_than_others_bear(interval_s: float, liveness: int) -> None:
    """Also where heartbeats are as rare as an operator may want them: a tick may come a quarter late."""
    book: Peers[str, None] = Peers(interval_s=1e9, silence_s=interval_s * liveness)
    book.join("a", "a", 1, None, 0.0)
    idle_s = idle_interval(interval_s, liveness)
    book.heard("a", 0.0, next_s=idle_s)
    assert book.expire(2 * 1.25 * (idle_s or between_signs(interval_s, liveness))) == []


def test_ticks_of_all_fall_on_the_same_moments() -> None:
    async def test(loop: VirtualLoop) -> None:
        pace = Pace(INTERVAL_S, LIVENESS, lambda: False)
        await asyncio.sleep(0.3)
        await pace.tick(0.0, AWAKE_S)
        assert loop.now == pytest.approx(0.5)
        await pace.tick(IDLE_S, AWAKE_S)
        assert loop.now == pytest.approx(2.0)
        await pace.tick(IDLE_S, AWAKE_S)
        assert loop.now == pytest.approx(4.0)

    in_virtual_time(test)


def test_whoever_sleeps_long_wakes_when_something_begins() -> None:
    async def test(loop: VirtualLoop) -> None:
        pace = Pace(INTERVAL_S, LIVENESS, lambda: False)
        woken: list[tuple[str, float]] = []
        news = asyncio.Event()

        async def sleep(name: str, next_s: float, event: asyncio.Event | None = None) -> None:
            await pace.tick(next_s, AWAKE_S, event)
            woken.append((name, loop.now))

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(sleep("idle", IDLE_S))
            tasks.create_task(sleep("told", IDLE_S, news))
            tasks.create_task(sleep("awake", 0.0))
            await asyncio.sleep(0.1)
            pace.stir()
        assert woken == [("idle", 0.1), ("told", 0.1), ("awake", 0.5)]
        assert news.is_set()

    in_virtual_time(test)


def test_a_sleep_ends_by_its_own_news_and_by_its_own_limit() -> None:
    async def test(loop: VirtualLoop) -> None:
        pace = Pace(INTERVAL_S, LIVENESS, lambda: False)
        news = asyncio.Event()
        loop.call_later(0.1, news.set)
        await pace.tick(0.0, AWAKE_S, news)
        assert loop.now == pytest.approx(0.1)
        news.clear()
        await pace.tick(IDLE_S, AWAKE_S, news, at_most_s=0.2)
        assert loop.now == pytest.approx(0.3)
        assert not news.is_set()
        pace.stir()
        assert not news.is_set(), "nobody sleeps by it any more"

    in_virtual_time(test)
