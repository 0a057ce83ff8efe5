"""``microserve up`` and ``down``: a whole mesh on this machine, from its model to its last child.

Owns the order of events; processes are the supervisor's, the screen is the view's.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import structlog

from microserve.protocol import log
from microserve.protocol.bus.curve import create_mesh_keys
from microserve.protocol.errors import ConfigError
from microserve.protocol.logging.setup import Log, configure
from microserve.protocol.logging.sink import shift
from microserve.protocol.process.notify import Notifier
from microserve.protocol.settings.settings import Settings
from microserve.services.local.composition import (
    Composition,
    PortTaken,
    check_ports,
    compose,
    first_key,
    model_assignments,
)
from microserve.services.local.demo.model import FetchFailed, default_cache, fetch
from microserve.services.local.demo.request import PROMPT, DemoFailed, Gateway
from microserve.services.local.directory import AlreadyRunning, ChildState, MeshDirectory, MeshState
from microserve.services.local.hub.name import HubError
from microserve.services.local.hub.resolve import resolve
from microserve.services.local.metric_ports import write_targets
from microserve.services.local.supervisor import Child, MeshFailed, Supervisor
from microserve.services.local.view import View

EXIT_FAILED = 1
EXIT_CONFIG = 2
DEMO_TIMEOUT_S = 120.0
REWRITE_S = 1.0
"""Before a state that could not be written is tried again."""

_logger = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class UpOptions:
    flags: Sequence[str]
    """``--config`` and ``--set`` as given, for the children."""
    demo: bool = True
    oneshot: bool = False
    detach: bool = False


def up(settings: Settings, options: UpOptions, directory: MeshDirectory, view: View) -> int:
    """Run a mesh until told to stop (or until it runs, with ``detach``); returns the exit code."""
    umask = os.umask(0o077)  # state, logs and keys are for nobody else
    try:
        if running := directory.supervisor():
            raise AlreadyRunning(f"a mesh runs here already, under process {running}")
        check_ports(settings)
        if not settings.model.path:
            path = fetch(default_cache(os.environ), view.progress)
            settings = msgspec.structs.replace(
                settings, model=msgspec.structs.replace(settings.model, path=str(path))
            )
        else:
            settings = resolve(settings, os.environ, view.progress)
        if options.demo and settings.gateway.api_keys_file and not first_key(settings):
            if options.oneshot:
                raise ConfigError(
                    "gateway.api_keys must hold a key for --oneshot: gateway.api_keys_file has hashes only",
                    field="gateway.api_keys",
                )
            options = replace(options, demo=False)
        if options.detach:
            return _up_detached(settings, options, directory, view)
        with directory.hold():
            logs = (Path(settings.log.dir) if settings.log.dir else directory.logs).absolute()
            _set_aside(logs, settings.log.keep)
            keys = _keys(settings, directory)
            composition = compose(settings, options.flags, logs, directory.root / "control.db", keys)
            write_targets(directory.root, composition.children, composition.gateway.url)
            own = msgspec.structs.replace(settings.log, dir=str(logs), file="")
            events = configure("supervisor", "up", own)
            try:
                return asyncio.run(_Up(settings, options, directory, view, composition, events).run())
            finally:
                events.close()
    except ConfigError as error:
        view.problem(f"Error: {error}")
        return EXIT_CONFIG
    except (FetchFailed, HubError, AlreadyRunning, PortTaken, MeshFailed, DemoFailed, OSError) as error:
        view.problem(f"Error: {error}")
        return EXIT_FAILED
    except KeyboardInterrupt:
        return 130
    finally:
        os.umask(umask)
        view.close()


def _keys(settings: Settings, directory: MeshDirectory) -> str:
    """Directory of keys for all children: the operator's, or our own; empty if there are to be none."""
    if settings.bus.curve_dir:
        return str(Path(settings.bus.curve_dir).absolute())
    return "" if settings.bus.insecure else str(create_mesh_keys(directory.keys).absolute())


class _Up:
    """One mesh in the foreground."""

    def __init__(
        self,
        settings: Settings,
        options: UpOptions,
        directory: MeshDirectory,
        view: View,
        composition: Composition,
        lines: Log,
    ) -> None:
        self._options = options
        self._directory = directory
        self._view = view
        self._composition = composition
        self._notifier = Notifier.from_environment(os.environ)
        self._ready_timeout_s = settings.mesh.ready_timeout_s
        self._ready = False
        self._failure = ""
        self._asked_to_stop = False
        self._unwritten = asyncio.Event()
        """What the directory says of the mesh is out of date."""
        self._lines = lines
        self._on_terminal = _has_terminal()
        self._supervisor = Supervisor(
            composition.children,
            max_restarts=settings.mesh.max_restarts,
            restart_window_s=settings.mesh.restart_window_s,
            ready_timeout_s=settings.mesh.ready_timeout_s,
            changed=self._changed,
        )

    async def run(self) -> int:
        task = asyncio.current_task()
        assert task is not None
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self._stop, task)
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._hang_up, task)
        try:
            async with self._supervisor:
                await self._supervisor.ready()
                async with asyncio.TaskGroup() as group:
                    watching = group.create_task(self._supervisor.watch())
                    rewriting = group.create_task(self._rewrite())
                    await self._introduce()
                    if self._options.oneshot:
                        watching.cancel()
                        rewriting.cancel()
        except asyncio.CancelledError:
            if not self._asked_to_stop:
                raise
        except (MeshFailed, DemoFailed, ExceptionGroup) as error:
            cause = error.exceptions[0] if isinstance(error, ExceptionGroup) else error
            self._failure = str(cause)
            self._changed()
            raise cause from None
        finally:
            self._notifier.close()
        return 0

    async def _introduce(self) -> None:
        """All children are up: see that a request gets through, and say how to go on."""
        gateway = self._composition.gateway
        await gateway.until_ready(self._ready_timeout_s)
        self._ready = True
        self._changed()
        self._notifier.send("READY=1", f"STATUS=ready at {gateway.url}")
        if self._options.demo:
            try:
                await show_answer(gateway, self._view)
            except DemoFailed as error:
                if self._options.oneshot:
                    raise
                self._view.problem(f"the demo request failed: {error}")
        if not self._options.oneshot:
            _show_where(
                self._view, gateway, self._composition.model, self._composition.children[0].log.parent
            )
            self._view.note("stop:     Ctrl-C")

    def _stop(self, task: asyncio.Task[int]) -> None:
        if self._asked_to_stop:
            self._supervisor.kill()
            return
        self._asked_to_stop = True
        self._notifier.send("STOPPING=1")
        self._view.note("stopping; once more to kill")
        task.cancel()

    def _hang_up(self, task: asyncio.Task[int]) -> None:
        """The terminal is gone, and the mesh with it. Or somebody wants logs opened and settings read
        anew."""
        if self._on_terminal and not _has_terminal():
            self._stop(task)
            return
        self._lines.reopen()
        _logger.info(log.SETTINGS_RELOADED)
        self._supervisor.signal(signal.SIGHUP)

    def _changed(self, _child: Child | None = None) -> None:
        """Write and show how the mesh is. Neither a full disk nor a closed terminal ends it."""
        state = self._state()
        if not self._directory.write(state) and not self._unwritten.is_set():
            _logger.error(log.STATE_UNWRITTEN, directory=str(self._directory.root))
            self._unwritten.set()
        self._view.mesh(state)

    async def _rewrite(self) -> None:
        """What could not be written is written when there is room."""
        while True:
            await self._unwritten.wait()
            await asyncio.sleep(REWRITE_S)
            if self._directory.write(self._state()):
                self._unwritten.clear()

    def _state(self) -> MeshState:
        return MeshState(
            pid=os.getpid(),
            url=self._composition.gateway.url,
            model=self._composition.model,
            index=self._composition.index,
            router=self._composition.router,
            keys=self._composition.keys,
            children=[ChildState.of(child) for child in self._composition.children],
            ready=self._ready,
            failure=self._failure,
            foreign=self._composition.foreign,
        )


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True


async def show_answer(gateway: Gateway, view: View) -> None:
    """The demo: one streamed answer. Raises :class:`DemoFailed`."""
    try:
        async with asyncio.timeout(DEMO_TIMEOUT_S):
            model = await gateway.model()
            view.asked(PROMPT)
            view.answered(await gateway.chat(model, PROMPT, view.piece))
    except TimeoutError:
        raise DemoFailed(f"no whole answer within {DEMO_TIMEOUT_S:g} s") from None


def _show_where(view: View, gateway: Gateway, model: str, logs: Path) -> None:
    body = {"model": model, "messages": [{"role": "user", "content": "Hello!"}], "stream": True}
    key = " -H 'authorization: Bearer KEY'" if gateway.api_key else ""
    view.note(
        f"\ntry:      curl -N {gateway.url}/v1/chat/completions -H 'content-type: application/json'{key} "
        f"-d {shlex.quote(json.dumps(body))}\n"
        f"page:     {gateway.url}/\n"
        "talk:     microserve chat\n"
        "watch:    microserve top\n"
        f"logs:     {logs}   (microserve tail --follow)\n"
        f"metrics:  {gateway.url}/metrics   (of all services: targets.json in the mesh's directory)"
    )


def _set_aside(logs: Path, keep: int) -> None:
    """Events of the run before stay readable as ``*.jsonl.1``, if there is room for names."""
    for file in [*logs.glob("*.jsonl"), *logs.glob("*.out")]:
        with contextlib.suppress(OSError):
            shift(file, max(1, keep))


# --- in the background -----------------------------------------------------------------------------


def _up_detached(settings: Settings, options: UpOptions, directory: MeshDirectory, view: View) -> int:
    directory.make()
    command = [sys.executable, "-P", "-m", "microserve.services", "up", "--no-demo"]
    command += ["--directory", str(directory.root), *options.flags]
    command += model_assignments(settings)
    with open(directory.root / "up.out", "wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    try:
        state = asyncio.run(_until_settled(process, directory, view))
    except BaseException:
        process.terminate()
        process.wait()
        raise
    if state is None or state.failure:
        process.wait()
        problem = (directory.root / "up.out").read_text(errors="replace").strip().rpartition("\n")[2]
        raise MeshFailed(state.failure if state else problem)
    gateway = Gateway.at(state.url, first_key(settings), settings.gateway.tls_cert)
    code = 0
    if options.demo:
        try:
            asyncio.run(show_answer(gateway, view))
        except DemoFailed as error:
            view.problem(f"the demo request failed: {error}")
            code = EXIT_FAILED
    _show_where(view, gateway, state.model, directory.logs)
    view.note("stop:     microserve down")
    return code


async def _until_settled(
    process: subprocess.Popen[bytes], directory: MeshDirectory, view: View
) -> MeshState | None:
    """The background mesh's state once it is ready or has failed; None if it ended without one."""
    shown: MeshState | None = None
    while True:
        gone = process.poll() is not None
        state = directory.read()
        if state is not None and state.pid == process.pid and state != shown:
            shown = state
            view.mesh(state)
            if state.ready or state.failure:
                return state
        if gone:
            return None
        await asyncio.sleep(0.05)


def down(directory: MeshDirectory, timeout_s: float) -> str:
    """Stop the mesh of ``directory``; returns what there is to say. Raises :class:`MeshFailed`."""
    pid = directory.supervisor()
    if not pid:
        return "no mesh runs here"
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return "no mesh runs here"
    try:
        if directory.supervisor() != pid:  # else the descriptor could be of an unrelated new process
            return "no mesh runs here"
        signal.pidfd_send_signal(descriptor, signal.SIGTERM)
        ended = select.poll()
        ended.register(descriptor, select.POLLIN)
        if ended.poll(timeout_s * 1000):
            return "stopped"
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)  # its children's leashes end them
        ended.poll(timeout_s * 1000)
        raise MeshFailed(f"the supervisor did not stop within {timeout_s:g} s and was killed")
    finally:
        os.close(descriptor)
