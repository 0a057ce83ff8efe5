"""A gateway of several processes (``gateway.workers``): this one holds the port and keeps the others running.

Owns the workers' commands and what is said of them as a whole. They share the port by SO_REUSEPORT, so the
kernel deals connections out, and one that dies takes its own with it and no others. Serves nothing itself.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from microserve.protocol.bus.transport import ZmqBus
from microserve.protocol.errors import ConfigError
from microserve.protocol.process.lifecycle import Lifecycle
from microserve.protocol.settings.settings import Settings
from microserve.services.local.composition import assignment, service_command, worker_flag
from microserve.services.local.supervisor import EXIT_CONFIG, Child, ChildState, MeshFailed, Supervisor

STOP_MARGIN_S = 6.0
"""From the end of ``gateway.drain_s`` to SIGKILL."""


def workers(settings: Settings, port: int, flags: Sequence[str]) -> list[Child]:
    """Children for ``settings``, which ``flags`` describe to them. Their lines go where ours do, or to files
    beside ours."""

    stop_s = settings.gateway.drain_s + STOP_MARGIN_S

    def worker(number: int) -> Child:
        name = f"{settings.gateway.id}-{number}"
        own = [*assignment("gateway.id", settings.gateway.id), *assignment("gateway.port", port)]
        lines, output = Path(os.devnull), None
        if settings.log.dir:
            file = Path(settings.log.file or f"gateway-{settings.gateway.id}.jsonl")
            lines = Path(settings.log.dir) / file.with_stem(f"{file.stem}-{number}")
            output = lines.with_suffix(".out")
            own += assignment("log.file", str(lines.relative_to(settings.log.dir)))
        argv = [*service_command("gateway"), *flags, *own, *worker_flag(number)]
        return Child(name, argv, lines, output, 0, stop_s, settings.mesh.watchdog_s)

    return [worker(number) for number in range(settings.gateway.workers)]


def hold_port(host: str, port: int) -> socket.socket:
    """A socket that keeps the port ours while no worker listens, and takes no connection itself.

    Raises :class:`ConfigError` where somebody listens there already, be it another gateway of several."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ConfigError(f"gateway.host {host}: {error}", field="gateway.host") from None
    family, kind, number, _, address = found[0]
    try:
        with socket.socket(family, kind, number) as alone:
            alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            alone.bind(address)
        held = socket.socket(family, kind, number)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(address)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}", field="gateway.port") from None
    return held


async def run_workers(settings: Settings, bus: ZmqBus, lifecycle: Lifecycle, *, flags: Sequence[str]) -> None:
    """Keep the workers running until cancelled, or until all have been asked to leave.

    Raises :class:`ConfigError` where a setting is wrong for them, :class:`MeshFailed` where none can be kept
    running."""
    with hold_port(settings.gateway.host, settings.gateway.port) as held:
        children = workers(settings, held.getsockname()[1], flags)
        left = asyncio.Event()
        async with Supervisor(
            children,
            max_restarts=settings.mesh.max_restarts,
            restart_window_s=settings.mesh.restart_window_s,
            ready_timeout_s=settings.mesh.ready_timeout_s,
            changed=partial(_tell, children, lifecycle, left),
        ) as supervisor:
            lifecycle.on_reload(lambda _: supervisor.signal(signal.SIGHUP))
            try:
                await supervisor.ready()
                lifecycle.ready(children[0].address, about=f"{len(children)} workers")
                await _first(supervisor.watch(), left.wait())
            except MeshFailed as failure:
                if any(child.exit_code == EXIT_CONFIG for child in children):
                    raise ConfigError(str(failure)) from None
                raise


async def _first(*waits: object) -> None:
    """Until one of them is over; what it raises."""
    tasks = [asyncio.ensure_future(each) for each in waits]  # type: ignore[call-overload]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()


def _tell(children: Sequence[Child], lifecycle: Lifecycle, left: asyncio.Event, _child: Child) -> None:
    if all(child.state is ChildState.STOPPED for child in children):
        left.set()
    if lifecycle.address:
        count = sum(child.state is ChildState.READY for child in children)
        lifecycle.status(f"ready at {lifecycle.address}, {count} of {len(children)} workers")
