"""A step thread that ends says so at once, however it ends, and whatever becomes of the log."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any, cast

import pytest
import structlog

from microserve.services.engine.core.core import EngineCore
from microserve.services.engine.step_thread import StepThread

TIMEOUT_S = 20.0


class Core:
    """A core of which one call fails."""

    def __init__(self, failing: str, error: BaseException) -> None:
        self.lock = threading.RLock()
        self._failing = failing
        self._error = error

    def _call(self, name: str) -> None:
        if name == self._failing:
            raise self._error

    def step(self) -> bool:
        self._call("step")
        return False

    def output(self) -> None:
        self._call("output")

    def wait_for_work(self, _timeout_s: float) -> None:
        self._call("wait")

    def wake(self) -> None: ...


@pytest.fixture
def broken_log() -> Iterator[None]:
    def fail(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    structlog.configure(processors=[fail])
    yield
    structlog.reset_defaults()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("error", [RuntimeError("bug"), OSError(24, "files"), MemoryError(), SystemExit(3)])
@pytest.mark.parametrize("failing", ["step", "output", "wait"])
@pytest.mark.usefixtures("broken_log")
def test_its_end_is_told_whatever_it_ended_by(failing: str, error: BaseException) -> None:
    crashed = threading.Event()
    core = Core(failing, error)
    steps = StepThread(cast(EngineCore, core), core.output, crashed.set)
    steps.start()
    assert crashed.wait(TIMEOUT_S)
    assert steps.stop(TIMEOUT_S)


def test_an_end_that_was_asked_for_is_no_crash() -> None:
    crashed = threading.Event()
    core = Core("", RuntimeError())
    steps = StepThread(cast(EngineCore, core), core.output, crashed.set)
    steps.start()
    assert steps.stop(TIMEOUT_S)
    assert not crashed.is_set()
