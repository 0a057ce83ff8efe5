"""Starts child processes, restarts single ones that crash, and leaves none behind (Linux).

Owns the life of processes and nothing of what they do: a child is a command, a log file and the order in
which it stops. Policy after Erlang's supervisors: one_for_one, with an intensity limit; a child that fails
before it was ever ready fails the start of the whole. One that was ready and ended with exit code 0 was asked
to (SIGTERM, ``microserve drain``) and stays stopped, as under ``Restart=on-failure`` of systemd.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

import structlog

from microserve.protocol import log
from microserve.services.local.event_log import LogFile, last_error

READY_POLL_S = 0.05
EXIT_STOPPED = 0
EXIT_CONFIG = 2
"""A child that exits so has a wrong setting: starting it again cannot help."""

_LEASH = Path(__file__).with_name("leash.py")
_logger = structlog.get_logger()


class ChildState(StrEnum):
    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    STOPPING = "stopping"
    STOPPED = "stopped"
    FAILED = "failed"


class MeshFailed(Exception):
    """The children cannot be kept running; the text says which one, why, and where its log is."""


@dataclass(slots=True)
class Child:
    """What to run, and how it is doing."""

    name: str
    argv: Sequence[str]
    log: Path
    """Its stdout and stderr, appended; readiness is read from its ``service.ready`` event."""
    stop_order: int = 0
    """Lower stops first; equals stop together."""
    stop_timeout_s: float = 10.0
    """From SIGTERM to SIGKILL."""
    state: ChildState = ChildState.STARTING
    pid: int = 0
    address: str = ""
    restarts: int = 0
    detail: str = ""
    """The last error that it logged."""
    exited: asyncio.Event = field(default_factory=asyncio.Event, repr=False)
    was_ready: bool = False


class RestartWindow:
    """At most ``max_restarts`` within ``window_s``. Sans-I/O: time comes in."""

    def __init__(self, max_restarts: int, window_s: float) -> None:
        self._max_restarts = max_restarts
        self._window_s = window_s
        self._restarts: deque[float] = deque()

    def allow(self, now: float) -> bool:
        """Count one more restart; False if that is one too many."""
        while self._restarts and now - self._restarts[0] >= self._window_s:
            self._restarts.popleft()
        if len(self._restarts) >= self._max_restarts:
            return False
        self._restarts.append(now)
        return True


class Supervisor:
    """``async with Supervisor(...)`` starts the children; leaving it stops them, in order, whatever happened.

    Use in the main thread (leash.py says why).
    """

    def __init__(
        self,
        children: Sequence[Child],
        *,
        max_restarts: int,
        restart_window_s: float,
        ready_timeout_s: float,
        changed: Callable[[Child], None] = lambda child: None,
    ) -> None:
        """``changed`` is called whenever a child's state is another one."""
        self.children = children
        self._window = RestartWindow(max_restarts, restart_window_s)
        self._limit = f"{max_restarts} restarts in {restart_window_s:g} s"
        self._ready_timeout_s = ready_timeout_s
        self._changed = changed
        self._stopping = False
        self._group = asyncio.TaskGroup()
        self._settled = asyncio.Event()
        """All have been ready, or one has failed."""
        self._failed = asyncio.Event()
        self._failure = ""

    async def __aenter__(self) -> Supervisor:
        await self._group.__aenter__()
        for child in self.children:
            self._group.create_task(self._keep(child))
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stopping = True
        try:
            await self._stop()
        finally:
            self.kill()
            await self._group.__aexit__(None, None, None)

    async def ready(self) -> None:
        """Wait until every child has been ready. Raises :class:`MeshFailed`."""
        await self._settled.wait()
        if self._failed.is_set():
            raise MeshFailed(self._failure)

    async def watch(self) -> None:
        """Wait until the children can no longer be kept running. Raises :class:`MeshFailed`."""
        await self._failed.wait()
        raise MeshFailed(self._failure)

    def kill(self) -> None:
        """SIGKILL to all that are left: the impatient end."""
        for child in self.children:
            if child.pid:
                _signal_group(child.pid, signal.SIGKILL)

    # --- one child -------------------------------------------------------------------------------

    async def _keep(self, child: Child) -> None:
        loop = asyncio.get_running_loop()
        while not self._stopping:
            code = await self._live(child)
            if self._stopping:
                break
            why = f"{child.name} ended with {_in_words(code)}"
            if child.detail:
                why = f"{why}: {child.detail}"
            if not child.was_ready or code == EXIT_CONFIG:
                return self._give_up(child, why)
            if code == EXIT_STOPPED:
                break
            if not self._window.allow(loop.time()):
                return self._give_up(child, f"{why}; that is more than {self._limit}")
            child.restarts += 1
            self._enter(child, ChildState.RESTARTING)
        self._enter(child, ChildState.STOPPED)

    async def _live(self, child: Child) -> int:
        """One life of the child, from spawn to its reaped exit; returns the exit code (-N: signal N)."""
        offset = child.log.stat().st_size if child.log.exists() else 0
        process = self._spawn(child)
        child.pid, child.detail = process.pid, ""
        child.exited.clear()
        _logger.info(log.CHILD_STARTED, child=child.name, child_pid=process.pid)
        self._changed(child)
        exited = self._group.create_task(_wait_exit(process.pid))
        try:
            await self._watch_start(child, offset, exited)
            await exited
        finally:
            exited.cancel()
            # What the child has started goes with it. The group's id cannot have been reused: its leader is
            # not reaped yet.
            _signal_group(process.pid, signal.SIGKILL)
            code = process.wait()
            child.pid = 0
            child.exited.set()
        child.detail = child.detail or (last_error(child.log, offset) if code else "")
        _logger.info(log.CHILD_EXITED, child=child.name, child_pid=process.pid, code=code, error=child.detail)
        return code

    def _spawn(self, child: Child) -> subprocess.Popen[bytes]:
        child.log.parent.mkdir(parents=True, exist_ok=True)
        # Type=notify belongs to whoever started us, not to our children.
        environment = {
            name: value
            for name, value in os.environ.items()
            if name not in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
        }
        leash = [sys.executable, "-S", "-E", str(_LEASH), str(os.getpid())]
        with open(child.log, "ab") as output:
            return subprocess.Popen(
                [*leash, *child.argv],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                process_group=0,  # a Ctrl-C in the terminal is ours to pass on, in order
            )

    async def _watch_start(self, child: Child, offset: int, exited: asyncio.Task[None]) -> None:
        """Return when the child is ready or gone; kill it if it is neither in time."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._ready_timeout_s
        events = LogFile(child.log, offset=offset)
        try:
            while True:
                gone = exited.done()  # before the last look: it may be ready and gone
                for event in events.read():
                    if event["event"] == log.SERVICE_READY:
                        child.address = str(event.get("address", ""))
                        child.was_ready = True
                        self._enter(child, ChildState.READY)
                        if all(other.was_ready for other in self.children):
                            self._settled.set()
                        return
                if gone:
                    return
                if loop.time() > deadline:
                    child.detail = f"not ready within {self._ready_timeout_s:g} s"
                    _signal_group(child.pid, signal.SIGKILL)
                    return
                await asyncio.wait([exited], timeout=READY_POLL_S)
        finally:
            events.close()

    def _give_up(self, child: Child, why: str) -> None:
        self._enter(child, ChildState.FAILED)
        if not self._failed.is_set():
            self._failure = f"{why}\nits log: {child.log}"
            self._failed.set()
            self._settled.set()

    def _enter(self, child: Child, state: ChildState) -> None:
        child.state = state
        self._changed(child)

    # --- the end ---------------------------------------------------------------------------------

    async def _stop(self) -> None:
        for order in sorted({child.stop_order for child in self.children}):
            stage = [child for child in self.children if child.stop_order == order and child.pid]
            for child in stage:
                self._enter(child, ChildState.STOPPING)
                os.kill(child.pid, signal.SIGTERM)
            await asyncio.gather(*map(_wait_or_kill, stage))


async def _wait_or_kill(child: Child) -> None:
    try:
        async with asyncio.timeout(child.stop_timeout_s):
            await child.exited.wait()
    except TimeoutError:
        child.detail = f"killed: did not stop within {child.stop_timeout_s:g} s"
        _signal_group(child.pid, signal.SIGKILL)
        await child.exited.wait()


async def _wait_exit(pid: int) -> None:
    """Return when the process has exited; it is left for the caller to reap."""
    loop = asyncio.get_running_loop()
    exited = asyncio.Event()
    descriptor = os.pidfd_open(pid)
    try:
        loop.add_reader(descriptor, exited.set)
        await exited.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


def _signal_group(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, number)


def _in_words(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
