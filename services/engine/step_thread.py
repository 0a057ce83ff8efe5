"""The thread that runs an :class:`EngineCore`'s steps."""

from __future__ import annotations

import threading
from collections.abc import Callable

import structlog

from microserve.protocol import log
from microserve.services.engine.core.core import EngineCore

IDLE_WAIT_S = 0.05
"""Idle wake-up of the step thread, for leases and deadlines; work wakes it at once."""

_logger = structlog.get_logger()


class StepThread:
    """Runs ``core.step()`` until stopped, off the event loop, so that a long step never delays an answer or a
    heartbeat; calls ``on_output`` (from this thread) after every step."""

    def __init__(self, core: EngineCore, on_output: Callable[[], None], on_crash: Callable[[], None]) -> None:
        self._core = core
        self._on_output = on_output
        self._on_crash = on_crash
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="step", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float) -> bool:
        """Ask it to end and wait; False if a step is still running after ``timeout_s``."""
        self._stopping.set()
        with self._core.lock:
            self._core.wake()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        """However this ends but by :meth:`stop`, it is told: an engine without its step thread serves
        nobody."""
        try:
            while not self._stopping.is_set():
                stepped = self._core.step()
                self._on_output()
                if not stepped and not self._stopping.is_set():
                    self._core.wait_for_work(IDLE_WAIT_S)
        except BaseException:
            # The state may be damaged: nothing may be served from it. The service ends, and with it the
            # incarnation; its peers see an engine that died.
            self._on_crash()
            _logger.exception(log.STEP_FAILED)
