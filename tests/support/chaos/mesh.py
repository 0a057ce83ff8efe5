"""The mesh that chaos is done to: single services restarted, their sockets really closed."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import random
import signal
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from microserve.protocol.bus.transport import Bus, ZmqBus
from microserve.protocol.settings.settings import BusSettings
from microserve.services.engine.core.request.record import IDLE_RECORD_S
from microserve.services.engine.core.state import PURGE_INTERVAL_S
from tests.support.engine.engine_client import EngineClient
from tests.support.process.processes import MeshProcesses

SYS_PIDFD_GETFD = 438
READY_S = 60.0
EXIT_S = 30.0
WHOLE_S = 20.0
"""After the last fault and the last request, every engine is whole within this: an engine that has sent keeps
the prompt for a further action, IDLE_RECORD_S after its last one (core/request/record.py)."""
assert WHOLE_S > 1.5 * (IDLE_RECORD_S + PURGE_INTERVAL_S)
LEASE_S = 3.0
"""Short, so that a freeze can outlive it."""
NUM_BLOCKS = 1024
EPHEMERAL_FROM = 32768

_libc = ctypes.CDLL(None, use_errno=True)


def quiet_port() -> int:
    """A free port below those that the kernel gives to outgoing connections.

    A service that is dead for seconds while its peers reconnect ten times a second would else, now and then,
    come back to a port that one of those connections was given as its own.
    """
    while True:
        port = random.randrange(20000, EPHEMERAL_FROM)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


@dataclass
class ChaosMesh(MeshProcesses):
    """Two routers, one gateway for both, three engines with small pools and short leases."""

    down: set[str] = field(default_factory=set)
    """Services that a fault has at this moment."""

    @contextlib.contextmanager
    def buses(self) -> Iterator[tuple[Bus, Bus]]:
        """Within a running loop: of who asks routers, and of who asks engines."""
        bus = ZmqBus(linger_s=0.1)
        try:
            yield bus, bus
        finally:
            bus.close()

    def alive(self, kind: str) -> list[str]:
        return [name for name in self.services if name.startswith(kind) and name not in self.down]

    def pid(self, name: str) -> int:
        return self.services[name].process.pid

    def send_signal(self, name: str, number: signal.Signals) -> None:
        self.services[name].process.send_signal(number)

    def kill(self, name: str) -> None:
        self.services[name].kill()

    async def drain(self, name: str) -> int:
        """SIGTERM; the exit code. Raises ``TimeoutError`` when it does not end."""
        process = self.services[name].process
        process.terminate()
        async with asyncio.timeout(EXIT_S):
            while (code := process.poll()) is None:
                await asyncio.sleep(0.05)
        return code

    async def restart(self, name: str) -> None:
        """A new life of a dead service; returns when it is ready. Call in the main thread (leash.py)."""
        service = self.start(name, wait=False)
        async with asyncio.timeout(READY_S):
            while '"service.ready"' not in service.log.read_text():
                if service.process.poll() is not None:
                    raise RuntimeError(f"{name} exited {service.process.returncode}: see {service.log}")
                await asyncio.sleep(0.05)
        self.wait_ready(name, 1.0)

    def harm(self, kind: str, name: str) -> None:
        """To the host of a service; hosts.py has such."""
        raise NotImplementedError(f"{kind}: {name} has no host of its own")

    def heal(self, name: str) -> None:
        raise NotImplementedError(f"{name} has no host of its own")

    def cut(self, rng: random.Random) -> tuple[str, str] | None:
        """Close one TCP connection under its owner's feet; who had it, and with whom ("client": us)."""
        listening: dict[int, str] = {}
        established: list[tuple[str, int, int, int]] = []
        for name in sorted(self.services):
            if name in self.down:
                continue
            for connection in psutil.Process(self.pid(name)).net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    listening[connection.laddr.port] = name
                elif connection.status == psutil.CONN_ESTABLISHED:
                    local, remote = connection.laddr.port, connection.raddr.port
                    established.append((name, connection.fd, local, remote))
        of_services = {local for _, _, local, _ in established}
        found = []
        for name, fd, local, remote in established:
            if remote in listening:
                found.append((name, fd, listening[remote]))
            elif listening.get(local) == name and remote not in of_services:
                found.append((name, fd, "client"))
        if not found:
            return None
        name, fd, other = rng.choice(found)
        _shut_down(self.pid(name), fd)
        return name, other

    async def wait_whole(self, bus: Bus, name: str) -> str:
        """Until the engine holds nothing and has every block back: empty, or what is left at the end."""
        left = "no answer"
        try:
            async with EngineClient(bus, self.services[name].address) as engine, asyncio.timeout(WHOLE_S):
                assert engine.info is not None
                while True:
                    stats = await engine.stats()
                    load = stats.load
                    held = {
                        "running": load.num_running,
                        "waiting": load.num_waiting,
                        "grants": load.num_grants,
                        "quarantined": load.quarantined_blocks,
                        "records": stats.counters["records"],
                        "blocks not free": engine.info.num_blocks - load.free_blocks,
                    }
                    left = ", ".join(f"{count} {what}" for what, count in held.items() if count)
                    if not left:
                        return ""
                    await asyncio.sleep(0.1)
        except TimeoutError:
            return left


def _shut_down(pid: int, fd: int) -> None:
    """``shutdown`` on a child's own socket: both ends see the connection end, as when a network drops it."""
    pidfd = os.pidfd_open(pid)
    try:
        copy = _libc.syscall(SYS_PIDFD_GETFD, pidfd, fd, 0)
        if copy < 0:
            return  # it was closed meanwhile
        with socket.socket(fileno=copy) as theirs:
            theirs.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # it was not connected any more
    finally:
        os.close(pidfd)


def chaos_mesh(model: Path, directory: Path, bus: BusSettings) -> ChaosMesh:
    return ChaosMesh(
        model,
        directory,
        num_engines=3,
        num_routers=2,
        gateway=True,
        make_port=quiet_port,
        settings=chaos_settings(bus),
    )


def chaos_settings(bus: BusSettings) -> list[str]:
    return [
        "model.dtype=float32",  # as the oracle
        f"kvcache.num_blocks={NUM_BLOCKS}",
        f"kvcache.lease_s={LEASE_S}",
        f"bus.heartbeat_interval_s={bus.heartbeat_interval_s}",
        f"bus.liveness={bus.liveness}",
        "engine.drain_s=10",
        "router.call_timeout_s=10",
    ]
