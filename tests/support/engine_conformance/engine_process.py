"""One engine as a process of its own: started by a command and settings, known by its address alone.

Owns the process: start, end, freeze, thaw. What it is told stands in :class:`Launch`; what it says of itself
comes from its socket (wire_client.py). Knows no backend.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import select
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from microserve.protocol.bus.curve import keys_of_role, peer_key
from tests.support.hosts.world import Host, World
from tests.support.process.nursery import Process
from tests.support.process.processes import LEASH, start_process

READY_S = 900.0
"""An engine may compile before it serves."""
STOP_S = 120.0
PORTS = range(20_000, 32_000)
"""Below those that connections take, and ``bind`` to port 0: between our look and the engine nobody does."""


@dataclass(frozen=True)
class Launch:
    """How engines of a run are started: ``COMMAND engine --config FILE --set SECTION.FIELD=VALUE ...``."""

    model: Path
    keys: Path
    """Of a mesh: a directory for each role."""
    command: str = ""
    """Of an engine of another environment; empty: this one's ``microserve``."""
    config: str = ""
    """File of settings, which ours go before."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """As TOML values, by ``section.field``."""
    world: World | None = None
    """Where engines stand on hosts of their own; else on this one."""
    oracle: str = ""
    """Transformers computes as these engines do, in this dtype; empty: that is not known."""

    def host_of(self, name: str) -> Host | None:
        """Of an engine: the last letter of its name counts hosts behind the front, over and over."""
        if self.world is None:
            return None
        hosts = list(self.world.hosts.values())[1:]
        return hosts[(ord(name[-1]) - ord("a")) % len(hosts)]

    @contextlib.contextmanager
    def joined(self) -> Iterator[None]:
        """Sockets that are opened meanwhile reach the engines."""
        with contextlib.nullcontext() if self.world is None else self.world.front.inside.joined():
            yield


@dataclass
class EngineProcess:
    """A process and what is needed to talk to it."""

    name: str
    address: str
    server_key: str
    process: Process
    log: Path

    @classmethod
    def start(cls, launch: Launch, name: str, directory: Path, **settings: str) -> EngineProcess:
        """``settings`` of this engine alone: ``section__field``. Returns at once."""
        host = launch.host_of(name)
        address = f"tcp://{'127.0.0.1' if host is None else host.address}:{_port()}"
        said = {
            "model.path": str(launch.model),
            "engine.id": name,
            "engine.address": address,
            "bus.curve_dir": str(launch.keys),
            "index.address": "tcp://127.0.0.1:1",  # nobody is there: an engine serves all the same
            **launch.settings,
            **{key.replace("__", "."): value for key, value in settings.items()},
        }
        if host is not None:
            others = "engine.events_address", "engine.replay_address", "kvcache.door_address"
            said |= dict.fromkeys(others, f"tcp://{host.address}:0")
        arguments = ["engine", *(["--config", launch.config] if launch.config else [])]
        for key, value in said.items():
            arguments += ["--set", f"{key}={value}"]
        log = directory / f"{name}.log"
        if host is not None:
            process: Process = _run_on(host, arguments, log)
        elif launch.command:
            process = _run(shlex.split(launch.command) + arguments, log)
        else:
            process = start_process("engine", arguments, log)
        server_key = peer_key(keys_of_role(launch.keys, "engine"), "service")
        return cls(name, address, server_key, process, log)

    def require_alive(self) -> None:
        if (code := self.process.poll()) is not None:
            raise AssertionError(f"{self.name} has ended with {code}:\n{self.log.read_text()[-4000:]}")

    def kill(self) -> None:
        """As by ``kill -9`` of the process that was started. What it has started is its own to end, and has
        ended when this returns: which of them peers know it by is its own business, too."""
        with contextlib.ExitStack() as closing:
            others = _handles(self.family()[1:], closing)
            self.process.kill()
            self.process.wait(STOP_S)
            until = time.monotonic() + STOP_S
            for pid, handle in others.items():
                ended, _, _ = select.select([handle], [], [], max(0.0, until - time.monotonic()))
                assert ended, f"process {pid}, which {self.name} had started, outlives it"

    def stop(self) -> None:
        """By SIGTERM, as an operator would: an engine that serves ends by itself, and well."""
        if self.process.poll() is None:
            self.thaw()
            self.process.terminate()
            try:
                code = self.process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self.kill()
                raise
            assert code == 0, f"{self.name} ended with {code}:\n{self.log.read_text()[-4000:]}"

    def freeze(self) -> None:
        """Stop all of it where it stands, children first asked last."""
        for pid in self.family():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)

    def thaw(self) -> None:
        for pid in self.family():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def family(self) -> list[int]:
        """The process and all that descend from it."""
        parents = dict(_parents())
        family = [self.process.pid]
        for pid in family:
            family += [child for child, parent in parents.items() if parent == pid]
        return family

    async def ended(self, timeout_s: float = STOP_S) -> int:
        """Its exit code, once it has ended by itself."""
        return await asyncio.to_thread(self.process.wait, timeout_s)


def _port() -> int:
    while True:
        port = random.SystemRandom().choice(PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _run(command: list[str], log: Path) -> Process:
    """On the leash: it dies with the test run."""
    leash = [sys.executable, "-S", "-E", str(LEASH), str(os.getpid())]
    with log.open("w") as sink:
        return subprocess.Popen(leash + command, stdout=sink, stderr=sink, stdin=subprocess.DEVNULL)


def _run_on(host: Host, arguments: list[str], log: Path) -> Process:
    """Of this environment, and gone with its host."""
    with log.open("w") as sink:
        return host.inside.start([sys.executable, "-P", "-m", "microserve.services", *arguments], sink=sink)


def _handles(pids: list[int], closing: contextlib.ExitStack) -> dict[int, int]:
    """A descriptor of each process that still is; readable when that has ended, whoever gets its pid."""
    handles = {}
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            handles[pid] = os.pidfd_open(pid)
            closing.callback(os.close, handles[pid])
    return handles


def _parents() -> Iterator[tuple[int, int]]:
    """Every process of the machine and its parent."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                # Behind the last bracket: a name may have brackets of its own.
                yield int(entry.name), int(entry.joinpath("stat").read_text().rpartition(")")[2].split()[1])
