"""A mesh of vLLM engines as `microserve up` starts it, and what of it the system knows: processes, names.

Everything is seen from outside: the mesh's own state file, event logs, /proc, /dev/shm, engines' `Stats`. Its
temporary directory is its own, so that what is left there is its.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from microserve.protocol.bus.curve import CurveKeys, keys_of_role, peer_key
from microserve.protocol.bus.transport import ZmqBus
from microserve.services.local.directory import ChildState, MeshDirectory, MeshState
from tests.support.engine_conformance.wire_client import WireClient

Part = Literal["front", "core", "worker"]
PARTS: tuple[Part, ...] = ("front", "core", "worker")
READY_S = 600.0
"""vLLM starts slowly on a busy machine."""
LOOK_S = 0.005
MICROSERVE = [sys.executable, "-P", "-m", "microserve.services"]
ENGINES = ("e0", "e1")


def _toml(value: object) -> str:
    """JSON is TOML, but for tables."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} = {_toml(each)}" for name, each in value.items()) + "}"
    return json.dumps(value)


async def until(is_so: Callable[[], object], what: str, timeout_s: float = READY_S) -> None:
    """Look again and again."""
    try:
        async with asyncio.timeout(timeout_s):
            while not is_so():
                await asyncio.sleep(LOOK_S)
    except TimeoutError:
        raise AssertionError(f"not within {timeout_s:g} s: {what}") from None


@dataclass
class VllmMesh:
    """Two engines, ``e0`` and ``e1``; a context manager."""

    model: Path
    python: Path
    directory: Path
    settings: dict[str, object]
    seen: set[tuple[int, str]] = field(default_factory=set)
    """Every process that was found in it: pid and when it started."""
    shared: set[str] = field(default_factory=set)
    """Names in /dev/shm that one of them had mapped."""
    free_blocks: int = 0
    """Of each engine, when it has served nobody."""

    def __post_init__(self) -> None:
        self.temporary = Path(tempfile.mkdtemp(prefix="vm-"))  # short: paths of sockets are
        self.mesh = MeshDirectory(self.directory / ".microserve")

    def __enter__(self) -> VllmMesh:
        said: dict[str, object] = {
            "model.path": str(self.model),
            "model.name": "tiny",
            "engine.backend": "vllm",
            "vllm.python": str(self.python),
            "index.address": "tcp://127.0.0.1:0",
            "router.address": "tcp://127.0.0.1:0",
            "gateway.port": 0,
            "mesh.engines": len(ENGINES),
            "mesh.ready_timeout_s": READY_S,
            "mesh.max_restarts": 1_000,
            **self.settings,
        }
        flags = [word for key, value in said.items() for word in ("--set", f"{key}={_toml(value)}")]
        started = self._run("up", "--detach", "--no-demo", *flags)
        if started.returncode != 0:
            self.__exit__()
            raise AssertionError(started.stdout + started.stderr)
        self.look()
        return self

    def __exit__(self, *_: object) -> None:
        """By force, if it still is there; whoever wants it to end well has called :meth:`down`."""
        if pid := self.mesh.supervisor():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.temporary, ignore_errors=True)

    def down(self) -> subprocess.CompletedProcess[str]:
        return self._run("down")

    def _run(self, *words: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "TMPDIR": str(self.temporary)}
        return subprocess.run(
            [*MICROSERVE, *words],
            cwd=self.directory,
            env=environment,
            capture_output=True,
            text=True,
            timeout=READY_S + 60.0,
            stdin=subprocess.DEVNULL,
            check=False,
        )

    # --- what it says of itself ----------------------------------------------------------------------

    @property
    def state(self) -> MeshState:
        state = self.mesh.read()
        assert state is not None
        return state

    def child(self, engine: str) -> ChildState:
        return next(each for each in self.state.children if each.name == f"engine-{engine}")

    def events(self, service: str, event: str) -> list[dict[str, Any]]:
        """Of its log, in order."""
        lines = (self.mesh.logs / f"{service}.jsonl").read_text().splitlines()
        found = [json.loads(line) for line in lines if f'"{event}"' in line and line.endswith("}")]
        return [each for each in found if each["event"] == event]

    def incarnations(self, engine: str) -> list[int]:
        """Of all lives of an engine that the index has heard of."""
        joined = self.events("index", "engine.joined")
        return list(dict.fromkeys(each["incarnation"] for each in joined if each["engine_id"] == engine))

    def engines_of(self, request_id: str) -> set[str]:
        """That had a part in it; empty as long as it is not over."""
        for event in self.events("router", "request.finished"):
            if event["request_id"].startswith(request_id):
                return set(event["engines"])
        return set()

    @contextlib.asynccontextmanager
    async def clients(self) -> AsyncIterator[dict[str, WireClient]]:
        """A connection to each engine that serves."""
        keys = self.mesh.keys
        server_key = peer_key(keys_of_role(keys, "engine"), "service")
        bus = ZmqBus(linger_s=0.1, keys=CurveKeys.load(keys_of_role(keys, "router")))
        clients = {
            engine: WireClient(bus, self.child(engine).address, server_key)
            for engine in ENGINES
            if self.child(engine).state == "ready"
        }
        try:
            for client in clients.values():
                await client.hello()
            yield clients
        finally:
            for client in clients.values():
                client.close()
            bus.close()

    async def count_blocks(self) -> None:
        async with self.clients() as clients:
            (self.free_blocks,) = {(await client.stats()).load.free_blocks for client in clients.values()}

    # --- what the system knows of it -----------------------------------------------------------------

    def parts(self, engine: str) -> dict[Part, int]:
        """Pids; what is not there yet is missing. vLLM's two are in the group of their front."""
        front = self.child(engine).pid
        if not front:
            return {}
        parts: dict[Part, int] = {"front": front}
        above = front
        for part in PARTS[1:]:
            found = [pid for pid, parent, group in _processes() if (parent, group) == (above, front)]
            found = [pid for pid in found if _is_of_vllm(pid)]
            if not found:
                break
            (above,) = found
            parts[part] = above
        return parts

    def look(self) -> None:
        """Remember who is in it, and which shared memory those have."""
        parents = {pid: parent for pid, parent, _ in _processes()}
        family = [self.mesh.supervisor()]
        for pid in family:
            family += [child for child, parent in parents.items() if parent == pid]
        for pid in family:
            with contextlib.suppress(OSError):
                self.seen.add((pid, _started_at(pid)))
        self.shared |= mapped(family)

    def left(self) -> list[str]:
        """In words, what is still there of all that was seen."""
        left = []
        for pid, started_at in self.seen:
            with contextlib.suppress(OSError):
                if _started_at(pid) == started_at:
                    left.append(f"process {pid}: {Path(f'/proc/{pid}/cmdline').read_text()[:200]}")
        left += [f"/dev/shm/{name}" for name in self.shared if Path("/dev/shm", name).exists()]
        # Compiled code is kept for the next start, as a cache is.
        names = sorted(each.name for each in self.temporary.iterdir())
        return left + [f"{self.temporary}/{name}" for name in names if not name.startswith("torchinductor_")]


def mapped(pids: Iterable[int]) -> set[str]:
    """Names in /dev/shm that they have."""
    names: set[str] = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            names |= set(re.findall(r" /dev/shm/(\S+)", Path(f"/proc/{pid}/maps").read_text()))
    return names


def freeze(pid: int) -> None:
    """Stop it; returns when it stands."""
    os.kill(pid, signal.SIGSTOP)
    until_s = time.monotonic() + 60.0
    while _stat(pid)[0] not in "Tt":
        assert time.monotonic() < until_s, f"process {pid} does not stop"
        os.sched_yield()


def thaw(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


def _is_of_vllm(pid: int) -> bool:
    """By its command, before or behind its having changed that."""
    with contextlib.suppress(OSError):
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        return command.startswith(b"VLLM::") or b"spawn_main" in command
    return False


def _stat(pid: int) -> list[str]:
    # Behind the last bracket: a name may have brackets of its own.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _started_at(pid: int) -> str:
    state, started_at = _stat(pid)[0], _stat(pid)[19]
    if state in "ZX":
        raise ProcessLookupError(pid)
    return started_at


def _processes() -> list[tuple[int, int, int]]:
    """Pid, parent and group of every living process of the machine."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                state, parent, group, *_ = _stat(int(entry.name))
                if state not in "ZX":
                    found.append((int(entry.name), int(parent), int(group)))
    return found
