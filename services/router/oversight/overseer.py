"""How long a strategy's code may hold the router: each run of it is timed, an endless one is broken off.

    span   from where the loop resumes the strategy to where it next waits; nobody else is served meanwhile
    stray  a strategy's code outside of a span: in a task that it started, a callback, a ``__del__``

A span over ``budget_s`` is told to whoever runs the strategy. One that lasts ``HANG_S``, or takes
``MAX_GROWTH_MB`` of memory, is broken off: a timer of the kernel looks every ``LOOK_S``, in the main thread,
and raises where that halves nothing (cut.py); ``time.sleep``, a regular expression and arithmetic with huge
numbers are ended by it as well. For strays the same holds, where the loop has not turned for as long. Where
no run has been for a while it looks every ``REST_S``: what one has left behind may hold the router so much
longer. What C code does without ever asking for signals cannot be ended from within: a watchdog outside has
to (stuck.py).

Counts the looks and not the clock, and of each what the thread did not have to wait for the processor: so a
process that was stopped, or got next to nothing of a busy machine, is not taken for one that hangs.
Knows no requests and no strategies.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import signal
import sys
import types
from collections.abc import Awaitable, Callable, Generator
from time import perf_counter
from types import FrameType, TracebackType
from typing import Any, Self, TypeVar, cast

from microserve.protocol.errors import StrategyError
from microserve.services.router.oversight.author import AUTHOR, Author, Verdict
from microserve.services.router.oversight.cut import BrokenOff, Trap, is_theirs, may_be_cut, place
from microserve.services.router.oversight.meter import Meter
from microserve.services.router.oversight.mistake import harmless
from microserve.services.router.oversight.stuck import AGAIN_S, StuckTrace

HANG_S = 0.5
LOOK_S = 0.05
REST_S = AGAIN_S
"""Between two looks while there is no run, and has been none for as long."""
SHORT_S = 2 * LOOK_S
"""For the cleanup of a version that has hung before."""
MAX_GROWTH_MB = 128
_SIGNAL, _TIMER = signal.SIGALRM, signal.ITIMER_REAL
LEAST_SHARE = 0.25
"""Of the time to a hang, for which it must have been able to run."""

_ELSEWHERE = "this version was broken off in another request"

T = TypeVar("T")


class StrategyHung(StrategyError):
    """Its code was broken off."""


class Condemned(StrategyError):
    """Its version has hung in another request, so this one was not let on."""


class Overseer:
    """For one loop, in the main thread; as a context manager it also breaks off what hangs."""

    def __init__(self, budget_s: float, stuck: StuckTrace | None = None) -> None:
        """``stuck`` is told that there was a look."""
        self._budget_s = budget_s
        self._stuck = stuck
        self._look_s = LOOK_S
        """Between two looks, now."""
        self._quiet_s = 0.0
        """For so long no look has found a run."""
        self._unsaid_s = 0.0
        """Since it was last said that the main thread is alive."""
        self._num_runs = 0
        """That have begun and not ended, waiting ones included."""
        self._began: float | None = None
        """Of the span that runs."""
        self._hang_s = HANG_S
        """For that span."""
        self._reason = ""
        """Why that is to be broken off."""
        self.place = ""
        """``FILE:LINE`` where the last span that a look has found stood then."""
        self._was_cut = False
        """It has been."""
        self._seen: float | None = None
        """The span that the last look found."""
        self._num_looks = 0
        """At that span, or at strays within one turn of the loop."""
        self._is_turning = False
        """The loop has been asked for a turn, and has not come to it."""
        self._worked_s = 0.0
        """Of the time of these looks, that in which it could run."""
        self._starved_s = 0.0
        self._is_found = False
        """One of these looks has found that it is to be broken off."""
        self._grown_from = 0
        self._meter = Meter()
        self._abandoned: list[Any] = []
        """What is never to run again: its cleanup hangs too."""
        self._trap = Trap(self._cut)
        self._before: tuple[Any, float, float] = (signal.SIG_DFL, 0.0, 0.0)

    def call(self, function: Callable[[], T]) -> T:
        """Call it as one span, however long it may be below ``HANG_S``. Raises as :meth:`run`."""
        self._begin(HANG_S)
        result: T | None = None
        try:
            result = function()
        except BaseException as error:
            self._raise(error)
        finally:
            was_cut = self._end()
        if was_cut:
            raise self._hung()
        return cast(T, result)

    @types.coroutine
    def run(
        self, awaitable: Awaitable[T], author: Author, on_slow: Callable[[float], None]
    ) -> Generator[Any, Any, T]:
        """Await it; ``on_slow`` hears the seconds of each span over the budget.

        Raises what it raises, :class:`StrategyHung` when it was broken off, and :class:`Condemned`.
        """
        self._num_runs += 1
        try:
            return (yield from self._run(awaitable.__await__(), author, on_slow))
        finally:
            self._num_runs -= 1

    def _run(
        self, inner: Generator[Any, Any, T], author: Author, on_slow: Callable[[float], None]
    ) -> Generator[Any, Any, T]:
        value: Any = None
        error: BaseException | None = None
        while True:
            verdict = author.verdict()
            if verdict is Verdict.ABANDONED:
                self._abandoned.append(inner)  # else the collector would run its cleanup
                raise error if isinstance(error, asyncio.CancelledError) else Condemned(_ELSEWHERE)
            if verdict is Verdict.CONDEMNED and error is None:
                error = Condemned(_ELSEWHERE)
            began = self._begin(HANG_S if verdict is Verdict.FREE else SHORT_S)
            result: Any = None
            has_ended = False
            try:
                waited = inner.send(value) if error is None else inner.throw(error)
            except StopIteration as stop:
                has_ended, result = True, stop.value
            except BaseException as raised:
                self._raise(raised)
            finally:
                was_cut = self._end()
                if (seconds := perf_counter() - began) > self._budget_s:
                    on_slow(seconds)
            if was_cut:  # even if it has caught that and gone on
                raise self._hung() from None
            if has_ended:
                return result  # type: ignore[no-any-return]
            value = error = None
            try:
                value = yield waited
            except GeneratorExit:
                inner.close()
                raise
            except BaseException as thrown:
                error = thrown

    def _hung(self) -> StrategyHung:
        hung = StrategyHung(self._reason)
        hung.at = self.place
        return hung

    def _raise(self, error: BaseException) -> None:
        """What a span has raised, unless it was broken off; while it still is a span."""
        if self._was_cut:
            return
        try:
            mistake = harmless(error)
        except BrokenOff:
            return
        if not self._was_cut:
            raise mistake

    def _begin(self, hang_s: float) -> float:
        self._hang_s, self._was_cut = hang_s, False
        self._began = began = perf_counter()
        if self._look_s != LOOK_S:
            self._look_every(LOOK_S)
        return began

    def _end(self) -> bool:
        """Whether the span was broken off."""
        self._began = None
        self._trap.clear()
        was_cut, self._was_cut = self._was_cut, False
        return was_cut

    # --- what hangs --------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self._say_alive()
        handler = signal.signal(_SIGNAL, self._look)
        self._before = (handler, *signal.setitimer(_TIMER, self._look_s, self._look_s))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        handler, delay_s, interval_s = self._before
        signal.setitimer(_TIMER, 0.0)
        signal.signal(_SIGNAL, handler)
        signal.setitimer(_TIMER, delay_s, interval_s)
        self._meter.close()

    def _look(self, _number: int, frame: FrameType | None) -> None:
        self._unsaid_s += self._look_s
        if self._unsaid_s >= AGAIN_S:
            self._say_alive()
        if self._began is None:
            self._look_at_stray(frame)
            self._rest_if_quiet()
        elif self._began != self._seen:
            self._seen, self.place = self._began, place(frame)
            self._begin_looking()
            self._grown_from = self._meter.resident_mb()
        else:
            self.place = place(frame) or self.place
            grown_mb = self._meter.resident_mb() - self._grown_from
            if self._hangs():
                self._break_off(frame, f"the strategy held the router for {self._hang_s:g} s without waiting")
            elif grown_mb > MAX_GROWTH_MB:
                self._break_off(frame, f"the strategy took {grown_mb} MB of memory without waiting")

    def _rest_if_quiet(self) -> None:
        self._quiet_s = 0.0 if self._num_runs or self._is_turning else self._quiet_s + self._look_s
        if self._quiet_s >= REST_S and self._look_s == LOOK_S:
            self._look_every(REST_S)

    def _look_every(self, look_s: float) -> None:
        self._look_s, self._quiet_s = look_s, 0.0
        signal.setitimer(_TIMER, look_s, look_s)

    def _look_at_stray(self, frame: FrameType | None) -> None:
        loop = asyncio._get_running_loop()
        if loop is None or not is_theirs(frame):
            return
        if not self._is_turning:
            self._is_turning, self._hang_s = True, HANG_S
            if self._look_s != LOOK_S:
                self._look_every(LOOK_S)
            self._begin_looking()
            loop.call_soon_threadsafe(self._turned, context=contextvars.Context())
            return
        if self._hangs():
            reason = f"a task or callback of the strategy held the router for {HANG_S:g} s without waiting"
            author = AUTHOR.get()
            if author is not None and not self._was_cut:
                loop.call_soon_threadsafe(author.on_stray, reason)
            self._break_off(frame, reason)

    def _begin_looking(self) -> None:
        self._num_looks, self._worked_s, self._is_found = 0, 0.0, False
        self._starved_s = self._meter.starved_s()

    def _hangs(self) -> bool:
        """After one look more."""
        before, self._starved_s = self._starved_s, self._meter.starved_s()
        self._num_looks += 1
        self._worked_s += max(0.0, LOOK_S - (self._starved_s - before))
        is_long = self._num_looks * LOOK_S >= self._hang_s
        return is_long and self._worked_s >= self._hang_s * LEAST_SHARE

    def _turned(self) -> None:
        """The loop goes on: whatever there was of strays has given way."""
        self._is_turning = self._was_cut = False
        self._trap.clear()

    def _break_off(self, frame: FrameType | None, reason: str) -> None:
        self._reason = reason
        is_late, self._is_found = self._is_found, True
        cuts = may_be_cut(frame, is_late=is_late)
        if self._was_cut or not cuts:
            self._trap.set(frame)
        if cuts:
            raise self._cut()

    def _cut(self) -> BrokenOff:
        self._was_cut = True
        return BrokenOff(self._reason, self._dropped)

    def _dropped(self) -> None:
        """If what was broken off still runs, it has caught that: once more, at its next instruction."""
        if self._was_cut and (self._began is not None or self._is_turning):
            self._trap.set(sys._getframe().f_back)

    def _say_alive(self) -> None:
        self._unsaid_s = 0.0
        if self._stuck is not None:
            with contextlib.suppress(Exception):  # no thread to be had: a router serves without
                self._stuck.alive()
