"""Starts child processes, restarts single ones that crash, and leaves none behind (Linux).

Owns the life of processes and nothing of what they do: a child is a command, a log file and the order in
which it stops. Policy after Erlang's supervisors: one_for_one, with an intensity limit for each; a child that
is over it is left down and shown, and the others serve on. A child that fails before it was ever ready fails
the start of the whole. One that was ready and ended with exit code 0 was asked to (SIGTERM, ``microserve
drain``) and stays stopped, as under ``Restart=on-failure`` of systemd.

A child that has not said for its time that it makes progress (``WATCHDOG=1``) is killed, and started again as
any that crashes.

What may fail here (a descriptor, a process, memory, whoever is told) costs a pause and a second try.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

import structlog

from microserve.protocol import log
from microserve.protocol.process.scratch import sweep
from microserve.services.local.event_log import last_error
from microserve.services.local.exit import wait_exit
from microserve.services.local.notice import NoticeSocket, Silence, facts_of

SPAWN_RETRY_S = 1.0
"""Before a child is started again for which there was no descriptor, no memory or no process."""
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
    """Events, which it writes itself."""
    output: Path | None
    """Its stdout and stderr, appended: what is said by who cannot write events (yet, or any more). None: they
    go where ours do."""
    stop_order: int = 0
    """Lower stops first; equals stop together."""
    stop_timeout_s: float = 10.0
    """From SIGTERM to SIGKILL."""
    watchdog_s: float = 0.0
    """Once it is ready: longest time without progress; 0: any."""
    state: ChildState = ChildState.STARTING
    pid: int = 0
    address: str = ""
    about: str = ""
    """What it says of itself beside its address."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """The same by name."""
    metrics: str = ""
    """``HOST:PORT`` at which its metrics are read; empty: nowhere of its own."""
    restarts: int = 0
    exit_code: int | None = None
    """Of its last life (-N: signal N); None: it has not ended yet."""
    detail: str = ""
    """The last error that it logged."""
    exited: asyncio.Event = field(default_factory=asyncio.Event, repr=False)
    became_ready: asyncio.Event = field(default_factory=asyncio.Event, repr=False)
    """In this life."""
    was_ready: bool = False
    """In any life."""


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
        """``max_restarts`` in ``restart_window_s``: of each child. ``changed`` is called whenever a child's
        state is another one; what it raises is logged."""
        self.children = children
        self._windows = {child.name: RestartWindow(max_restarts, restart_window_s) for child in children}
        self._limit = f"{max_restarts} restarts in {restart_window_s:g} s"
        self._ready_timeout_s = ready_timeout_s
        self._changed = changed
        self._stopping = asyncio.Event()
        self._group = asyncio.TaskGroup()
        self._settled = asyncio.Event()
        """All have been ready, or one has failed."""
        self._failed = asyncio.Event()
        self._failure = ""
        self._notices: NoticeSocket | None = None
        self._silence = Silence()

    async def __aenter__(self) -> Supervisor:
        self._notices = NoticeSocket(self._take_notice)
        await self._group.__aenter__()
        for child in self.children:
            self._group.create_task(self._keep(child))
        self._watching = self._group.create_task(self._watch_silence())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stopping.set()
        self._watching.cancel()
        try:
            await self._stop()
        finally:
            self.kill()
            await self._group.__aexit__(None, None, None)
            if self._notices is not None:
                self._notices.close()

    async def ready(self) -> None:
        """Wait until every child has been ready. Raises :class:`MeshFailed`."""
        await self._settled.wait()
        if self._failed.is_set():
            raise MeshFailed(self._failure)

    async def watch(self) -> None:
        """Wait until no child can be kept running any more. Raises :class:`MeshFailed`."""
        await self._failed.wait()
        raise MeshFailed(self._failure)

    def signal(self, number: int) -> None:
        """To all that are ready: one that is still loading may not know what to do with it."""
        for child in self.children:
            if child.pid and child.became_ready.is_set():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child.pid, number)

    def kill(self) -> None:
        """SIGKILL to all that are left: the impatient end."""
        for child in self.children:
            if child.pid:
                _signal_group(child.pid, signal.SIGKILL)

    # --- one child -------------------------------------------------------------------------------

    async def _keep(self, child: Child) -> None:
        """All lives of a child; whatever goes wrong in here is this child's, and no other one's."""
        loop = asyncio.get_running_loop()
        while not self._stopping.is_set():
            try:
                code = await self._live(child)
            except Exception as error:
                # No descriptor, no memory, no process to be had: not the child's doing, and it may pass.
                why = f"{child.name} cannot be started: {error}"
                if not self._settled.is_set():
                    return self._give_up(child, why)
                _logger.error(log.CHILD_FAILED, child=child.name, error=why)
                child.detail = str(error)
                self._enter(child, ChildState.RESTARTING)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(SPAWN_RETRY_S):
                        await self._stopping.wait()
                continue
            if self._stopping.is_set():
                break
            why = f"{child.name} ended with {_in_words(code)}"
            if child.detail:
                why = f"{why}: {child.detail}"
            if not child.was_ready or code == EXIT_CONFIG:
                return self._give_up(child, why)
            if code == EXIT_STOPPED:
                break
            if not self._windows[child.name].allow(loop.time()):
                return self._give_up(child, f"{why}; that is more than {self._limit}")
            child.restarts += 1
            self._enter(child, ChildState.RESTARTING)
        self._enter(child, ChildState.STOPPED)
        self._look_for_the_end()

    async def _live(self, child: Child) -> int:
        """One life of the child, from spawn to its reaped exit; returns the exit code (-N: signal N).

        Raises ``OSError`` when it cannot be started."""
        offsets = [(path, _size(path)) for path in (child.log, child.output) if path is not None]
        child.became_ready.clear()
        child.exited.clear()
        process = self._spawn(child)
        child.pid, child.detail = process.pid, ""
        _logger.info(log.CHILD_STARTED, child=child.name, child_pid=process.pid)
        self._tell(child)
        exited = self._group.create_task(wait_exit(process.pid))
        try:
            await self._watch_start(child, exited)
            await exited
        finally:
            exited.cancel()
            # What the child has started goes with it. The group's id cannot have been reused: its leader is
            # not reaped yet.
            _signal_group(process.pid, signal.SIGKILL)
            code = child.exit_code = process.wait()
            self._silence.forget(process.pid)
            child.pid = 0
            sweep()
            child.exited.set()
        said = (last_error(path, offset) for path, offset in offsets)
        child.detail = child.detail or (next(filter(None, said), "") if code else "")
        _logger.info(log.CHILD_EXITED, child=child.name, child_pid=process.pid, code=code, error=child.detail)
        return code

    def _spawn(self, child: Child) -> subprocess.Popen[bytes]:
        # Type=notify belongs to whoever started us, not to our children: they tell us.
        environment = {
            name: value for name, value in os.environ.items() if name not in ("WATCHDOG_USEC", "WATCHDOG_PID")
        }
        if self._notices is not None:
            environment["NOTIFY_SOCKET"] = self._notices.address
            if child.watchdog_s > 0.0:
                environment["WATCHDOG_USEC"] = str(int(child.watchdog_s * 1e6))
        leash = [sys.executable, "-S", "-E", str(_LEASH), str(os.getpid())]
        output = None if child.output is None else _open_output(child.output)
        try:
            return subprocess.Popen(
                [*leash, *child.argv],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                process_group=0,  # a Ctrl-C in the terminal is ours to pass on, in order
            )
        finally:
            if output is not None and output >= 0:
                os.close(output)

    async def _watch_start(self, child: Child, exited: asyncio.Task[None]) -> None:
        """Return when the child is ready or gone; kill it if it is neither in time."""
        ready = asyncio.create_task(child.became_ready.wait())
        try:
            done, _ = await asyncio.wait(
                [ready, exited], timeout=self._ready_timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            ready.cancel()
        if exited in done and self._notices is not None:
            self._notices.drain()  # it may have been ready, and gone
        elif not done:
            child.detail = f"not ready within {self._ready_timeout_s:g} s"
            _signal_group(child.pid, signal.SIGKILL)

    def _take_notice(self, pid: int, fields: Mapping[str, str]) -> None:
        child = next((each for each in self.children if each.pid == pid), None)
        if child is None:
            return
        now = asyncio.get_running_loop().time()
        if fields.get("WATCHDOG") == "1":
            self._silence.hear(pid, now)
        if fields.get("READY") == "1" and not child.became_ready.is_set():
            child.address, child.was_ready = fields.get("X_ADDRESS", ""), True
            child.about, child.facts = fields.get("X_ABOUT", ""), facts_of(fields.get("X_FACTS", ""))
            child.became_ready.set()
            self._silence.expect(pid, child.watchdog_s, now)
            if child.state is not ChildState.STOPPING:
                self._enter(child, ChildState.READY)
            if all(other.was_ready for other in self.children):
                self._settled.set()
        elif status := fields.get("STATUS"):
            child.detail = "" if status.startswith("ready") else status
            self._tell(child)

    async def _watch_silence(self) -> None:
        """Kill who makes no progress; its task does the rest."""
        while True:
            await asyncio.sleep(self._silence.look_s)
            if self._notices is not None:
                self._notices.drain()
            for pid in self._silence.look(asyncio.get_running_loop().time()):
                child = next(each for each in self.children if each.pid == pid)
                child.detail = f"killed: no progress for {child.watchdog_s:g} s"
                _logger.error(log.CHILD_STUCK, child=child.name, child_pid=pid, error=child.detail)
                self._silence.forget(pid)
                _signal_group(pid, signal.SIGKILL)

    def _give_up(self, child: Child, why: str) -> None:
        """Leave it down. The others serve on, unless the mesh has not come up with it."""
        _logger.error(log.CHILD_FAILED, child=child.name, error=why)
        child.detail = why
        self._enter(child, ChildState.FAILED)
        self._failure = f"{why}\nits log: {child.log}"
        if not self._settled.is_set():
            self._failed.set()
            self._settled.set()
        self._look_for_the_end()

    def _look_for_the_end(self) -> None:
        """Nobody is left, and not because all were asked to leave."""
        over = (ChildState.FAILED, ChildState.STOPPED)
        if self._failure and all(child.state in over for child in self.children):
            self._failed.set()

    def _enter(self, child: Child, state: ChildState) -> None:
        child.state = state
        self._tell(child)

    def _tell(self, child: Child) -> None:
        try:
            self._changed(child)
        except Exception:  # whoever shows it must not end what it shows
            _logger.exception(log.CHILD_FAILED, child=child.name, error="its state could not be shown")

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


def _size(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.stat().st_size
    return 0


def _open_output(path: Path) -> int:
    """A descriptor for what the child writes; nowhere (``DEVNULL``) if its file cannot be had."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    except OSError as error:
        _logger.warning(log.CHILD_FAILED, error=f"{path} cannot be written: {error}")
        return subprocess.DEVNULL


def _signal_group(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, number)


def _in_words(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
