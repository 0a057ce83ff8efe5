"""The step thread of a simulated engine: a greenlet that computes in virtual time.

Owns when a step goes on. The step code is the engine's own (``EngineCore.step``); it is left and taken up
between layers and inside one-sided writes, as a thread would be, but only where the loop says so. A killed
engine's greenlet never runs again; a frozen one's waits in its process's stash.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

import greenlet
import structlog

from microserve.protocol import log
from microserve.protocol.errors import InternalError
from microserve.services.engine.core.core import EngineCore
from microserve.services.engine.step_thread import IDLE_WAIT_S
from microserve.services.simulation.loop import Process, VirtualHandle, VirtualLoop

IDLE_LOOK_S = 0.2
"""Between two looks of an engine for which nothing is on its way: leases end so late at most."""
FOREVER_S = 1e6
"""Of an engine that waits until it is woken."""

_logger = structlog.get_logger()


class Pacer:
    """Lets one engine's step wait in virtual time. Outside of a step, waiting takes no time at all."""

    def __init__(self, loop: VirtualLoop, process: Process) -> None:
        self.slowness = 1.0
        """Factor on all waits: a slow machine."""
        self._loop = loop
        self._process = process
        self._context = process.context()
        self._steps: greenlet.greenlet | None = None
        self._timer: VirtualHandle | None = None
        self.is_idle = False
        """Is the step thread waiting for work?"""
        self._generation = 0

    def run(self, function: Callable[[], None]) -> None:
        """Start ``function`` as the step thread."""
        self._steps = greenlet.greenlet(function)
        self._resume_after(0.0)

    def sleep(self, seconds: float) -> None:
        """Of the step thread: go on after ``seconds``."""
        if self._steps is None or greenlet.getcurrent() is not self._steps:
            return
        self._timer = self._resume_after(seconds * self.slowness)
        self._leave()

    def wait(self, timeout_s: float) -> None:
        """Of the step thread: go on after ``timeout_s``, or when :meth:`wake` is called."""
        if greenlet.getcurrent() is not self._steps:
            raise InternalError("only the step thread waits for work")
        self._timer, self.is_idle = self._resume_after(timeout_s), True
        self._leave()

    def wake(self, after_s: float = 0.0) -> None:
        """End :meth:`wait`, if the step thread is in it."""
        if self.is_idle:
            self.hurry(after_s)

    def hurry(self, after_s: float = 0.0) -> None:
        """End whatever the step thread waits for."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer, self.is_idle = self._resume_after(after_s), False

    def kill(self) -> None:
        """The step thread never goes on."""
        steps, self._steps = self._steps, None
        self._generation += 1
        if steps is not None and not steps.dead and greenlet.getcurrent() is not steps:
            steps.throw(greenlet.GreenletExit)

    @property
    def is_over(self) -> bool:
        return self._steps is None or self._steps.dead

    def _leave(self) -> None:
        parent = greenlet.getcurrent().parent
        if parent is None:
            raise InternalError("the step thread has nobody to go back to")
        parent.switch()

    def _resume_after(self, seconds: float) -> VirtualHandle:
        generation = self._generation
        caller, self._loop.current = self._loop.current, self._process
        handle = self._loop.call_later(seconds, self._resume, generation, context=self._context)
        self._loop.current = caller
        return handle

    def _resume(self, generation: int) -> None:
        self._timer, self.is_idle = None, False
        if self._steps is not None and generation == self._generation and not self._steps.dead:
            self._steps.parent = greenlet.getcurrent()
            self._steps.switch()


class VirtualCondition:
    """In the place of the core's ``threading.Condition``; proves that nobody waits while holding it.

    Whoever waits is woken when KV arrives (the engine's heap says so), and looks seldom by itself: a real
    engine that waits for KV looks every millisecond, and one whose leases run twenty times a second, which
    would cost more than all else here and show nothing more.
    """

    def __init__(self, pacer: Pacer) -> None:
        self._pacer = pacer
        self._owner: greenlet.greenlet | None = None
        self._depth = 0

    def __enter__(self) -> bool:
        current = greenlet.getcurrent()
        if self._depth and self._owner is not current:
            raise InternalError("the engine's lock is taken while its holder waits")
        self._owner = current
        self._depth += 1
        return True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        self._depth -= 1

    def wait(self, timeout: float | None = None) -> bool:
        depth, self._depth = self._depth, 0
        try:
            if timeout is None:
                self._pacer.wait(FOREVER_S)
            else:
                self._pacer.wait(max(timeout, IDLE_LOOK_S) if timeout >= IDLE_WAIT_S else IDLE_WAIT_S)
        finally:
            self._owner, self._depth = greenlet.getcurrent(), depth
        return True

    def notify_all(self) -> None:
        self._pacer.wake()


class VirtualSteps:
    """``StepThread`` without a thread."""

    def __init__(
        self, pacer: Pacer, core: EngineCore, on_output: Callable[[], None], on_crash: Callable[[], None]
    ) -> None:
        self._pacer = pacer
        self._core = core
        self._on_output = on_output
        self._on_crash = on_crash
        self._stopping = False

    def start(self) -> None:
        self._pacer.run(self._run)

    def stop(self, timeout_s: float) -> bool:
        """False if a step was running: virtual time does not pass in a call, so it is cut off where it is."""
        self._stopping = True
        is_between_steps = self._pacer.is_idle or self._pacer.is_over
        self._pacer.kill()
        return is_between_steps

    def _run(self) -> None:
        while not self._stopping:
            try:
                stepped = self._core.step()
            except Exception:
                _logger.exception(log.STEP_FAILED)
                self._on_crash()
                return
            self._on_output()
            if not stepped and not self._stopping:
                self._core.wait_for_work(IDLE_WAIT_S)
