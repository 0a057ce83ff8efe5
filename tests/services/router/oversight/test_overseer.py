"""How long a strategy may hold the router: told beyond its budget, broken off when it never ends."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from microserve.services.router.oversight.author import Author
from microserve.services.router.oversight.overseer import (
    HANG_S,
    LOOK_S,
    REST_S,
    Overseer,
    StrategyHung,
)

pytestmark = pytest.mark.slow


@pytest.fixture
def overseer() -> Iterator[Overseer]:
    with Overseer(budget_s=10.0) as overseer:
        yield overseer
    assert signal.getsignal(signal.SIGALRM) is not overseer._look


def ignore(_seconds: float) -> None:
    """Slow spans do not matter here."""


async def loops() -> None:
    while True:
        pass


async def sleeps() -> None:
    time.sleep(600)  # noqa: ASYNC251


async def loops_and_catches() -> None:
    while True:
        try:
            while True:
                pass
        except Exception:
            continue


async def computes_in_a_library() -> None:
    max(itertools.count(), key=lambda number: number)


@pytest.mark.parametrize("hangs", [loops, sleeps, loops_and_catches, computes_in_a_library])
def test_what_never_ends_is_broken_off(overseer: Overseer, hangs: Callable[[], Awaitable[None]]) -> None:
    with pytest.raises(StrategyHung, match="held the router"):
        asyncio.run(_await(overseer.run(hangs(), Author("s", 1), ignore)))


async def _await(awaitable: Awaitable[object]) -> object:
    return await awaitable


def test_it_looks_seldom_where_nothing_runs_and_often_from_the_first_run_on(overseer: Overseer) -> None:
    def interval_s() -> float:
        return signal.getitimer(signal.ITIMER_REAL)[1]

    def look(times: int) -> None:
        for _ in range(times):
            overseer._look(signal.SIGALRM, None)

    async def main() -> None:
        waiting = asyncio.create_task(_await(overseer.run(gate.wait(), Author("s", 1), ignore)))
        await asyncio.sleep(0)
        assert interval_s() == pytest.approx(LOOK_S)
        look(100)  # it waits, but it may have left something that hangs
        assert interval_s() == pytest.approx(LOOK_S)
        gate.set()
        await waiting

    look(int(REST_S / LOOK_S) + 1)
    assert interval_s() == pytest.approx(REST_S)
    gate = asyncio.Event()
    asyncio.run(main())
    look(int(REST_S / LOOK_S) + 1)
    assert interval_s() == pytest.approx(REST_S)
    with pytest.raises(StrategyHung, match="held the router"):
        asyncio.run(_await(overseer.run(loops(), Author("s", 1), ignore)))


def test_after_that_the_next_one_runs(overseer: Overseer) -> None:
    async def main() -> str:
        with pytest.raises(StrategyHung):
            await overseer.run(loops(), Author("s", 1), ignore)
        return await overseer.run(asyncio.sleep(0.01, "well"), Author("s", 1), ignore)

    assert asyncio.run(main()) == "well"


def test_waiting_is_not_holding(overseer: Overseer) -> None:
    async def waits() -> int:
        rounds = 0
        until = asyncio.get_running_loop().time() + 1.2 * HANG_S
        while asyncio.get_running_loop().time() < until:
            await asyncio.sleep(0)
            rounds += 1
        return rounds

    assert asyncio.run(_await(overseer.run(waits(), Author("s", 1), ignore))) != 0


def test_a_span_over_the_budget_is_told_and_others_are_not() -> None:
    told: list[float] = []

    async def body() -> None:
        await asyncio.sleep(0)
        time.sleep(0.06)  # noqa: ASYNC251
        await asyncio.sleep(0.06)

    with Overseer(budget_s=0.05) as overseer:
        asyncio.run(_await(overseer.run(body(), Author("s", 1), told.append)))
    assert max(told) >= 0.06
    assert len(told) < 3, "waiting is no span"


def test_it_passes_values_errors_and_cancellation_on(overseer: Overseer) -> None:
    async def fails() -> None:
        await asyncio.sleep(0)
        raise KeyError("x")

    async def main() -> None:
        assert await overseer.run(asyncio.sleep(0, 5), Author("s", 1), ignore) == 5
        with pytest.raises(KeyError):
            await overseer.run(fails(), Author("s", 1), ignore)
        task = asyncio.ensure_future(_await(overseer.run(asyncio.sleep(60), Author("s", 1), ignore)))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())


FROZEN = f"""
import asyncio, sys, time
from microserve.services.router.oversight.author import Author
from microserve.services.router.oversight.overseer import Overseer

async def body():
    print("running", flush=True)
    end = time.process_time() + {HANG_S / 10}
    while time.process_time() < end:
        pass
    return "well"

async def main(overseer):
    print(await overseer.run(body(), Author("s", 1), lambda seconds: None), flush=True)

with Overseer(10.0) as overseer:
    asyncio.run(main(overseer))
"""


def test_a_process_that_was_stopped_meanwhile_is_not_taken_for_one_that_hangs() -> None:
    with subprocess.Popen([sys.executable, "-c", FROZEN], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "running\n"
        child.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WNOWAIT)
        threading.Event().wait(3 * HANG_S)  # the time that it is stopped for is what is tested
        child.send_signal(signal.SIGCONT)
        assert child.stdout.read() == "well\n"
        assert child.wait(20) == 0


def test_nothing_of_the_routers_own_code_is_cut_in_half(overseer: Overseer) -> None:
    """The strategy calls code of the package that takes longer than it may hold the router: that comes to its
    end, and then the strategy is broken off."""
    module: dict[str, Any] = {"__name__": "microserve.services.router.engines.load", "done": []}
    ends = HANG_S + 0.3
    code = "import time\ndef work():\n    end = time.thread_time() + %f\n" % ends  # noqa: UP031
    code += "    while time.thread_time() < end:\n        pass\n    done.append('whole')\n"
    exec(code, module)
    after: list[str] = []

    async def body() -> None:
        module["work"]()
        after.append("went on")

    with pytest.raises(StrategyHung):
        asyncio.run(_await(overseer.run(body(), Author("s", 1), ignore)))
    assert module["done"] == ["whole"]
    assert after == []
