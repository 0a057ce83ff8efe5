"""How long a strategy's code may hold the router: each run of it is timed, an endless one is broken off.

    span   from where the loop resumes the strategy to where it next waits; nobody else is served meanwhile

A span over ``budget_s`` is told to whoever runs the strategy. One that lasts ``HANG_S`` is broken off: a
thread that looks at the span sends a signal to the main thread, whose handler raises in the strategy
(``time.sleep`` is ended by it as well). It raises only where nothing of the router's own stands between here
and the code that runs: a late router is better than one whose books are half written. Tasks that a strategy
starts by itself are not seen.

Counts the thread's looks and not the clock, so a process that was stopped for a while is not taken for one
that hangs. Knows no requests and no strategies.
"""

from __future__ import annotations

import signal
import threading
import types
from collections.abc import Awaitable, Callable, Generator
from time import perf_counter
from types import FrameType, TracebackType
from typing import Any, Self, TypeVar

from microserve.protocol.errors import StrategyError

HANG_S = 0.5
LOOK_S = 0.05
_SIGNAL = signal.SIGUSR2
_PACKAGE = "microserve."
_STRATEGIES = "microserve.services.router.strategies."

T = TypeVar("T")


class StrategyHung(StrategyError):
    """Its code was broken off."""


class _BrokenOff(BaseException):
    """No ``Exception``: a strategy that catches everything shall not catch this."""


class Overseer:
    """For one loop, in the main thread; as a context manager it also breaks off what hangs."""

    def __init__(self, budget_s: float) -> None:
        self._budget_s = budget_s
        self._began: float | None = None
        """Of the span that runs; read by the thread."""
        self._main = threading.main_thread().ident
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, name="overseer", daemon=True)
        self._handler: Any = signal.SIG_DFL

    def call(self, function: Callable[[], T]) -> T:
        """Call it as one span, however long it may be below ``HANG_S``. Raises as :meth:`run`."""
        self._began = perf_counter()
        try:
            return function()
        except _BrokenOff as error:
            raise StrategyHung(str(error)) from None
        finally:
            self._began = None

    @types.coroutine
    def run(self, awaitable: Awaitable[T], on_slow: Callable[[float], None]) -> Generator[Any, Any, T]:
        """Await it; ``on_slow`` hears the seconds of each span over the budget.

        Raises what it raises, and :class:`StrategyHung` when it was broken off.
        """
        inner = awaitable.__await__()
        value: Any = None
        error: BaseException | None = None
        while True:
            self._began = began = perf_counter()
            try:
                waited = inner.send(value) if error is None else inner.throw(error)
            except StopIteration as stop:
                return stop.value  # type: ignore[no-any-return]
            except _BrokenOff as broken:
                raise StrategyHung(str(broken)) from None
            finally:
                self._began = None
                if (seconds := perf_counter() - began) > self._budget_s:
                    on_slow(seconds)
            value = error = None
            try:
                value = yield waited
            except GeneratorExit:
                inner.close()
                raise
            except BaseException as thrown:
                error = thrown

    # --- what hangs --------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self._handler = signal.signal(_SIGNAL, self._break_off)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        signal.signal(_SIGNAL, self._handler)

    def _look(self) -> None:
        seen, num_looks = None, 0
        while not self._stop.wait(LOOK_S):
            began = self._began
            num_looks = num_looks + 1 if began is not None and began == seen else 0
            seen = began
            if num_looks * LOOK_S >= HANG_S and self._main is not None:
                signal.pthread_kill(self._main, _SIGNAL)

    def _break_off(self, _number: int, frame: FrameType | None) -> None:
        if self._began is None or frame is None or frame.f_globals.get("__name__") == __name__:
            return  # it is over
        while frame is not None:
            name = str(frame.f_globals.get("__name__", ""))
            if name == __name__:
                raise _BrokenOff(f"the strategy held the router for {HANG_S:g} s without waiting")
            if name.startswith(_PACKAGE) and not name.startswith(_STRATEGIES):
                return  # the router's own; the thread asks again
            frame = frame.f_back
