"""A virtual-time event loop for many processes in one: nothing waits, nothing is left to chance.

Owns time, the order of callbacks, and what stops when a process is frozen or killed. A callback belongs to
the process in whose context it was scheduled, so a process can be stopped between any two of its callbacks,
and its clock may stand apart from the others'. Knows no sockets and no mesh.

    ready   callbacks due now, in order of scheduling
    timers  (due, number) order; when nothing is ready, time jumps to the next
    stash   callbacks of a frozen process, run in order when it thaws

Same calls, same order, same times: a run is a function of its inputs alone.
"""

from __future__ import annotations

import asyncio
import contextvars
import gc
import heapq
from collections import deque
from collections.abc import Callable, Coroutine
from enum import Enum
from typing import Any, TypeVar, cast

import msgspec

from microserve.protocol.errors import InternalError
from microserve.services.simulation.outside import Outside

MAX_CALLBACKS_AT_ONCE = 200_000
"""Callbacks without time moving on; more is a loop that spins."""
AT_ONCE_S = 0.01
"""Time that has moved by less has not: a loop that sleeps for a nanosecond spins as well."""
COLLECT_EVERY = 50_000
"""Objects between two collections of garbage while a mesh runs; the usual 700 cost a tenth of its time."""
COLLECT_AFTER = 200_000
"""Callbacks, of one run or many, until garbage is collected: what meshes leave adds up to gigabytes."""

T = TypeVar("T")


class TimeStandsStill(InternalError):
    """Callbacks follow each other, and time does not move on."""


class Life(Enum):
    RUNNING = "running"
    FROZEN = "frozen"
    DEAD = "dead"


class Process:
    """One simulated process: its callbacks, its tasks and its clock."""

    def __init__(self, loop: VirtualLoop, name: str, *, clock_offset_s: float = 0.0) -> None:
        self.name = name
        self.life = Life.RUNNING
        self.clock_offset_s = clock_offset_s
        """Its monotonic clock minus the loop's."""
        self.stash: list[VirtualHandle] = []
        self.home = self.context()
        """Of what others make happen here."""
        self.tasks: list[asyncio.Task[Any]] = []
        self._loop = loop

    @property
    def is_alive(self) -> bool:
        return self.life is not Life.DEAD

    @property
    def now(self) -> float:
        """Its own clock."""
        return self._loop.now + self.clock_offset_s

    def context(self) -> contextvars.Context:
        """A context in which whatever is scheduled belongs to this process."""
        context = contextvars.copy_context()
        context.run(_process.set, self)
        return context

    def spawn(self, coroutine: Coroutine[Any, Any, T], name: str = "") -> asyncio.Task[T]:
        context = self.context()
        return context.run(self._loop.create_task, coroutine, name=name or self.name)

    def freeze(self) -> None:
        """As SIGSTOP: no callback of it runs until :meth:`thaw`; what is sent to it waits."""
        if self.life is Life.RUNNING:
            self.life = Life.FROZEN

    def thaw(self) -> None:
        """As SIGCONT: everything that was due meanwhile runs now, in order."""
        if self.life is Life.FROZEN:
            self.life = Life.RUNNING
            stash, self.stash = self.stash, []
            for handle in stash:
                self._loop.make_ready(handle)

    def jump(self, seconds: float) -> None:
        """Its clock moves ahead at once, as after a suspended machine: timers in between are due."""
        self.clock_offset_s += seconds
        self._loop.hasten(self, seconds)

    def kill(self) -> None:
        """As SIGKILL. Tasks are unwound here so that nothing is left to the garbage collector; the owner must
        have cut off whatever they could still affect."""
        if self.life is Life.DEAD:
            return
        self.life = Life.DEAD
        self._loop.unwind_soon(self)


_process: contextvars.ContextVar[Process | None] = contextvars.ContextVar("process", default=None)


class VirtualHandle(msgspec.Struct, eq=False):
    """What ``call_soon`` and ``call_at`` return. A struct, for one is made for each callback, and a class of
    Python takes four times as long to make one."""

    process: Process | None
    callback: Callable[..., object] | None
    """None once it is cancelled."""
    args: tuple[Any, ...]
    context: contextvars.Context
    due: float = 0.0
    """Virtual time."""
    when_due: float = 0.0
    is_cancelled: bool = False

    def cancel(self) -> None:
        self.is_cancelled = True
        self.callback, self.args = None, ()

    def cancelled(self) -> bool:
        return self.is_cancelled

    def when(self) -> float:
        return self.when_due

    def run(self) -> None:
        if self.callback is not None:
            self.context.run(self.callback, *self.args)


class VirtualLoop(Outside):
    """An event loop as far as asyncio's tasks, futures and timeouts need one. Use :meth:`run`."""

    _uncollected = 0
    """Callbacks of all loops since garbage was collected."""

    def __init__(self) -> None:
        self.now = 0.0
        """Virtual time, seconds."""
        self.current: Process | None = None
        """Whose callback runs."""
        self.failures: list[str] = []
        """Exceptions that nobody caught; always a defect."""
        self.num_callbacks = 0
        self._ready: deque[VirtualHandle] = deque()
        self._timers: list[tuple[float, int, VirtualHandle]] = []
        self._number = 0
        self._last_at_once = MAX_CALLBACKS_AT_ONCE
        """Number of the callback at which time must have moved on."""
        self._at_once_until = 0.0
        self._running = False
        self._make_task: Callable[..., asyncio.Task[Any]] = lambda loop, coro, **options: asyncio.Task(
            coro, loop=loop, **options
        )

    @property
    def _as_loop(self) -> asyncio.AbstractEventLoop:
        return cast(asyncio.AbstractEventLoop, self)

    # --- asyncio's side ----------------------------------------------------------------------------

    def time(self) -> float:
        process = self.current
        return self.now if process is None else self.now + process.clock_offset_s

    def call_soon(
        self, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> VirtualHandle:
        context = context or contextvars.copy_context()
        handle = VirtualHandle(context.get(_process), callback, args, context)
        self._ready.append(handle)
        return handle

    call_soon_threadsafe = call_soon

    def call_later(
        self,
        delay: float,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> VirtualHandle:
        """As :meth:`call_at`, in one piece: most timers are set by this."""
        now, process = self.now, self.current
        context = context or contextvars.copy_context()
        if process is None:
            due = when = now + delay
        else:
            when = now + process.clock_offset_s + delay
            due = when - process.clock_offset_s
        handle = VirtualHandle(context.get(_process), callback, args, context, max(now, due), when)
        self._number += 1
        heapq.heappush(self._timers, (handle.due, self._number, handle))
        return handle

    def call_at(
        self,
        when: float,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> VirtualHandle:
        """``when`` is by the clock of the process that calls."""
        offset_s = 0.0 if self.current is None else self.current.clock_offset_s
        context = context or contextvars.copy_context()
        due = max(self.now, when - offset_s)
        handle = VirtualHandle(context.get(_process), callback, args, context, due, when)
        self._push(handle)
        return handle

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self._as_loop)

    def create_task(
        self,
        coro: Coroutine[Any, Any, T],
        *,
        name: str | None = None,
        context: contextvars.Context | None = None,
    ) -> asyncio.Task[T]:
        options = {} if context is None else {"context": context}
        task: asyncio.Task[T] = self._make_task(self._as_loop, coro, **options)
        if name is not None:
            task.set_name(name)
        process = (context or contextvars.copy_context()).get(_process)
        if process is not None:
            if len(process.tasks) % 64 == 63:
                process.tasks = [each for each in process.tasks if not each.done()]
            process.tasks.append(task)
        return task

    def set_task_factory(self, factory: Callable[..., asyncio.Task[Any]]) -> None:
        self._make_task = factory

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return self._running

    def is_closed(self) -> bool:
        return False

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        process = self.current
        if process is None or process.is_alive:
            error = context.get("exception")
            self.failures.append(
                f"{process.name if process else 'simulation'}: {context.get('message')}: {error!r}"
            )

    # --- running -----------------------------------------------------------------------------------

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run until ``coroutine`` is done. Raises :class:`InternalError` when nothing can go on."""
        asyncio.events._set_running_loop(self._as_loop)
        self._running = True
        thresholds = gc.get_threshold()
        # All that a mesh allocates is its own, and most of it goes by itself.
        gc.set_threshold(COLLECT_EVERY, *thresholds[1:])
        gc.freeze()  # what was there before stays
        try:
            task = self.create_task(coroutine, name="simulation")
            self._run_until(task.done)
            return task.result()
        finally:
            gc.set_threshold(*thresholds)
            gc.unfreeze()
            VirtualLoop._uncollected += self.num_callbacks
            # What was frozen and is thawed is collected by nobody else.
            if VirtualLoop._uncollected >= COLLECT_AFTER:
                VirtualLoop._uncollected = 0
                gc.collect()
            self._running, self.current = False, None
            asyncio.events._set_running_loop(None)

    def _run_until(self, is_done: Callable[[], bool]) -> None:
        """One callback after the other, and then all that are due at that moment. In one piece: a call for
        each callback takes as long as the rest of this."""
        ready, timers, pop, running = self._ready, self._timers, heapq.heappop, Life.RUNNING
        while ready or not is_done():
            if ready:
                handle = ready.popleft()
            elif timers:
                due, _, handle = pop(timers)
                if handle.is_cancelled or due != handle.due:
                    continue
                if due > self.now:  # to the next timer, which is due then
                    self.now = due
                    if due >= self._at_once_until:
                        self._at_once_until = due + AT_ONCE_S
                        self._last_at_once = self.num_callbacks + MAX_CALLBACKS_AT_ONCE
            else:
                raise InternalError("nothing is left to happen and everybody waits")
            process, callback = handle.process, handle.callback
            if callback is None:
                continue
            if process is not None and process.life is not running:
                if process.life is Life.FROZEN:
                    process.stash.append(handle)
                continue
            self.num_callbacks += 1
            if self.num_callbacks > self._last_at_once:
                raise TimeStandsStill(f"time stands still at {self.now:.6f}: somebody spins")
            self.current = process
            try:
                handle.context.run(callback, *handle.args)
            except Exception as error:
                self.call_exception_handler({"message": "a callback raised", "exception": error})

    def _push(self, handle: VirtualHandle) -> None:
        self._number += 1
        heapq.heappush(self._timers, (handle.due, self._number, handle))

    # --- what processes ask ------------------------------------------------------------------------

    def at(
        self,
        due: float,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> VirtualHandle:
        """By the loop's own clock, whoever calls; of no process unless ``context`` is one's."""
        context = context or contextvars.Context()
        handle = VirtualHandle(context.get(_process), callback, args, context, max(self.now, due), due)
        self._push(handle)
        return handle

    def arrive(self, due: float, process: Process, callback: Callable[..., object], *args: Any) -> None:
        """As :meth:`at`, at ``due`` >= now, in the process's own name; cannot be cancelled."""
        self._number += 1
        handle = VirtualHandle(process, callback, args, process.home, due, due)
        heapq.heappush(self._timers, (due, self._number, handle))

    def make_ready(self, handle: VirtualHandle) -> None:
        self._ready.append(handle)

    def hasten(self, process: Process, seconds: float) -> None:
        """The process's clock has moved ahead: so have its timers."""
        mine = [entry for entry in self._timers if entry[2].process is process and entry[0] == entry[2].due]
        for due, _, handle in sorted(mine, key=lambda entry: entry[:2]):
            handle.due = max(self.now, due - seconds)
            if handle.due != due:
                self._push(handle)

    def unwind_soon(self, process: Process) -> None:
        """Before anything else happens, but outside of whatever task runs now: tasks do not nest."""
        context = contextvars.Context()
        self._ready.appendleft(VirtualHandle(None, self._unwind, (process,), context))

    def _unwind(self, process: Process) -> None:
        """Cancel all tasks of a dead process until they have ended; each gets a few turns for its cleanup."""
        caller, self.current = self.current, process
        kept = deque(handle for handle in self._ready if handle.process is not process)
        # A task that was about to be woken must be: it cannot be cancelled once more.
        due = [*process.stash, *(handle for handle in self._ready if handle.process is process)]
        process.stash.clear()
        self._ready.clear()
        for handle in due:
            self._run_dead(handle)
        for _ in range(32):
            pending = [task for task in process.tasks if not task.done()]
            if not pending:
                break
            for task in pending:
                task.cancel()
            while self._ready:
                handle = self._ready.popleft()
                if handle.process is process:
                    self._run_dead(handle)
                else:
                    kept.append(handle)
        for task in process.tasks:
            if not task.done():
                task._log_destroy_pending = False  # type: ignore[attr-defined]
            elif not task.cancelled():
                task.exception()  # seen: a dead process has nobody to tell
        process.tasks.clear()
        self._ready.extend(kept)
        self.current = caller

    def _run_dead(self, handle: VirtualHandle) -> None:
        try:
            handle.run()
        except Exception:  # a dead process has nobody to tell
            return
