"""Code that nothing within the process can end: where it stood is known to the router's next life."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from microserve.protocol.messages.strategy.control import ControlEntry, ControlState, StrategyVersion
from microserve.services.router.authoring.definition import Strategy
from microserve.services.router.oversight.stuck import STUCK_S, StuckTrace
from microserve.services.router.rollout.book import StrategyBook
from microserve.services.router.rollout.control import STOOD_STILL, StrategyControl
from microserve.services.router.strategies.placing.data_parallel import data_parallel

pytestmark = [pytest.mark.slow]

TIMEOUT_S = 60.0

LIFE = """
import asyncio, sys
from microserve.services.router.oversight.author import Author
from microserve.services.router.oversight.overseer import Overseer
from microserve.services.router.oversight.stuck import StuckTrace

async def body():
    print("running", flush=True)
    {body}

async def main(overseer):
    await overseer.run(body(), Author("s", 1), lambda seconds: None)

stuck = StuckTrace(sys.argv[1])
with Overseer(10.0, stuck) as overseer:
    asyncio.run(main(overseer))
"""
IN_C = "sum(range(10**13))"
WAITS = "await asyncio.sleep(600)"


@contextmanager
def life(trace: Path, body: str) -> Iterator[subprocess.Popen[str]]:
    """Killed at the end."""
    script = trace.with_suffix(".py")
    script.write_text(LIFE.format(body=body))
    command = [sys.executable, str(script), str(trace)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "running\n"
            yield child
        finally:
            child.kill()


def until_written(trace: Path) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while b"  File" not in trace.read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def culprits_of(trace: Path) -> frozenset[str]:
    stuck = StuckTrace(str(trace))
    stuck.close()
    return stuck.culprits


def test_the_next_life_knows_whose_code_ran(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    with life(trace, IN_C):
        until_written(trace)
    assert str(trace.with_suffix(".py")) in culprits_of(trace)
    assert culprits_of(trace) == frozenset(), "only the next one"


@pytest.mark.parametrize(
    "body",
    [
        "import ctypes; ctypes.string_at(0)",
        "X = type('X', (), {'__repr__': lambda x: repr(x)}); sys.setrecursionlimit(10**7); repr(X())",
    ],
    ids=["a fault in C", "a stack that overflows"],
)
def test_the_next_life_knows_whose_code_crashed(tmp_path: Path, body: str) -> None:
    trace = tmp_path / "trace"
    with life(trace, body) as child:
        assert child.wait(TIMEOUT_S) < 0
    assert str(trace.with_suffix(".py")) in culprits_of(trace)


def test_whoever_was_only_stopped_leaves_nothing(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    with life(trace, WAITS) as child:
        child.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WNOWAIT)
        time.sleep(1.5 * STUCK_S)  # the time that it is stopped for is what is tested
        child.send_signal(signal.SIGCONT)
        time.sleep(STUCK_S)
    assert culprits_of(trace) == frozenset()


def test_a_version_that_stopped_the_life_before_is_not_even_loaded() -> None:
    source = "raise SystemExit('it was run')"
    digest = StrategyVersion(1, source, "ab" * 32, {})
    told = f"<strategy mine {'ab' * 8}>"
    book = StrategyBook([data_parallel])
    control = StrategyControl(book, lambda: 0.0, culprits={told})
    control.apply(ControlState(1, [ControlEntry("mine", digest)]))
    assert [(f.strategy, f.version, f.reason) for f in control.faults] == [("mine", 1, STOOD_STILL)]
    assert book.get("mine").function is data_parallel.function


def test_a_strategy_of_the_routers_own_that_did_is_suspended_for_one_life() -> None:
    async def own(mesh: object, request: object) -> object:
        yield

    mine = Strategy("mine", own, {}, {}, "")  # type: ignore[arg-type]
    for culprits, function in (({__file__}, data_parallel.function), ((), own)):
        book = StrategyBook([data_parallel, mine])
        control = StrategyControl(book, lambda: 0.0, culprits=culprits)
        assert book.get("mine").function is function
        assert control.faults == [], "there is no version to go back to"
