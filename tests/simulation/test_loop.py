"""Virtual time: jumps, order, and processes that freeze, die and have clocks of their own."""

from __future__ import annotations

import asyncio
import gc
import threading

import pytest

from microserve.protocol.errors import InternalError
from microserve.services.simulation.loop import Process, VirtualLoop


def test_hours_pass_at_once_and_in_order() -> None:
    loop, seen = VirtualLoop(), []

    async def sleeper(name: str, seconds: float) -> None:
        await asyncio.sleep(seconds)
        seen.append((name, loop.time()))

    async def main() -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(sleeper("late", 7200.0))
            tasks.create_task(sleeper("early", 1.0))
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(10.0):
                    await asyncio.Event().wait()

    loop.run(main())

    assert seen == [("early", 1.0), ("late", 7200.0)]


def test_a_mesh_in_which_nothing_can_happen_says_so() -> None:
    async def main() -> None:
        await asyncio.Event().wait()

    thresholds = gc.get_threshold()
    with pytest.raises(InternalError, match="nothing is left"):
        VirtualLoop().run(main())
    assert gc.get_threshold() == thresholds  # the collector is as it was


def test_a_frozen_process_does_nothing_and_then_all_of_it() -> None:
    loop, ticks = VirtualLoop(), []
    process = Process(loop, "a")

    async def tick() -> None:
        while True:
            await asyncio.sleep(1.0)
            ticks.append(loop.now)

    async def main() -> None:
        process.spawn(tick())
        await asyncio.sleep(2.5)
        process.freeze()
        await asyncio.sleep(10.0)
        assert ticks == [1.0, 2.0]
        process.thaw()
        await asyncio.sleep(1.2)
        process.kill()

    loop.run(main())

    assert ticks == [1.0, 2.0, 12.5, 13.5]


def test_a_dead_process_is_unwound_and_never_runs_again() -> None:
    loop, seen = VirtualLoop(), []
    process = Process(loop, "a")

    async def stubborn() -> None:
        try:
            await asyncio.sleep(1.0)
            seen.append("ran on")
        finally:
            seen.append("unwound")
            await asyncio.sleep(0.1)
            seen.append("slept in its cleanup")

    async def main() -> None:
        process.spawn(stubborn())
        frozen = process.spawn(stubborn())
        await asyncio.sleep(0.5)
        frozen.cancel()  # its wake-up is on its way
        process.kill()
        await asyncio.sleep(5.0)

    loop.run(main())

    assert seen == ["unwound", "unwound"]
    assert not loop.failures


def test_clocks_stand_apart_and_jump_ahead() -> None:
    loop, told = VirtualLoop(), []
    process = Process(loop, "a", clock_offset_s=100.0)

    async def sleeper() -> None:
        began = asyncio.get_running_loop().time()
        await asyncio.sleep(30.0)
        told.append((began, asyncio.get_running_loop().time(), loop.now))

    async def main() -> None:
        process.spawn(sleeper())
        await asyncio.sleep(1.0)
        process.jump(25.0)
        await asyncio.sleep(60.0)

    loop.run(main())

    # 30 s by its own clock, of which 25 took no time.
    assert told == [(100.0, 130.0, 5.0)]


def test_what_a_callback_raises_is_a_failure() -> None:
    loop = VirtualLoop()

    async def main() -> None:
        loop.call_soon(lambda: 1 // 0)
        await asyncio.sleep(0.1)

    loop.run(main())

    assert "ZeroDivisionError" in loop.failures[0]


def test_what_is_done_in_a_thread_takes_no_time_and_holds_nobody() -> None:
    loop, seen = VirtualLoop(), []

    def work(number: int) -> int:
        seen.append(threading.current_thread() is threading.main_thread())
        return 100 // number

    async def main() -> None:
        asking = asyncio.create_task(asyncio.to_thread(work, 4))
        await asyncio.sleep(0)
        assert (await asking, loop.now) == (25, 0.0)
        with pytest.raises(ZeroDivisionError):
            await asyncio.to_thread(work, 0)
        left = asyncio.create_task(asyncio.to_thread(work, 1))
        await asyncio.sleep(0)
        left.cancel()
        await asyncio.sleep(1.0)

    loop.run(main())
    assert (seen, loop.failures) == ([False] * 3, [])


def test_there_is_no_network_in_virtual_time() -> None:
    async def main() -> None:
        with pytest.raises(OSError, match="no network"):
            await asyncio.open_connection("127.0.0.1", 80)
        with pytest.raises(OSError, match="no network"):
            await asyncio.create_subprocess_exec("true")

    VirtualLoop().run(main())
