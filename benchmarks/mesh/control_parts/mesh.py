"""Real services around instant engines, each a process, and the CPU time that each has used.

Owns the processes: all are ended with the mesh. ``checkout``: whose code they run, so that two states of the
project can take turns in one run.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

PARTS = Path(__file__).parent
READY_S = 300.0
KINDS = ("gateway", "router", "engine", "index")


@dataclass
class Mesh:
    url: str
    processes: dict[str, list[psutil.Process]] = field(default_factory=dict)
    """By kind; a gateway's helpers are the gateway's."""

    def cpu_s(self) -> dict[str, float]:
        """User and system time of all threads so far, by kind."""
        return {kind: sum(map(_cpu_s, processes)) for kind, processes in self.processes.items()}

    def resident_mb(self) -> dict[str, float]:
        return {
            kind: sum(process.memory_info().rss for process in processes) / 2**20
            for kind, processes in self.processes.items()
        }


def _cpu_s(process: psutil.Process) -> float:
    """To the nanosecond, where ``/proc/PID/stat`` has hundredths of a second."""
    total = 0
    for each in [process, *process.children(recursive=True)]:
        for task in Path(f"/proc/{each.pid}/task").iterdir():
            with contextlib.suppress(OSError):
                total += int((task / "schedstat").read_text().split()[0])
    return total / 1e9


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def bare() -> Iterator[str]:
    """The URL of a server that does nothing."""
    with _running([sys.executable, str(PARTS / "bare.py")], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        yield process.stdout.readline().decode().strip()


@contextmanager
def mesh(
    model: str,
    *assignments: str,
    checkout: str = "",
    num_engines: int = 2,
    step_s: float = 0.0,
    locked: bool = False,
) -> Iterator[Mesh]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if checkout:
        environment["PYTHONPATH"] = str(Path(checkout).resolve() / ".src")
    port = _free_port()
    given = [f"model.path={model}", "model.name=bench", f"gateway.port={port}", "kvcache.num_blocks=16384"]
    given += [f"index.address=tcp://127.0.0.1:{_free_port()}"]
    given += [f"router.address=tcp://127.0.0.1:{_free_port()}"]
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="control-plane-")))
        given += [f"log.dir={home}/log", "log.level=info"]
        if locked:
            keys = [sys.executable, "-P", "-m", "microserve.services", "keys", "--mesh", f"{home}/keys"]
            subprocess.run(keys, env=environment, check=True, stdout=subprocess.DEVNULL)
            given.append(f"bus.curve_dir={home}/keys")
        else:
            given.append("bus.insecure=true")
        made = Mesh(f"http://127.0.0.1:{port}", {kind: [] for kind in KINDS})

        def start(kind: str, command: list[str], name: str, own: list[str]) -> None:
            words = [*given, f"log.file={name}.jsonl", *own, *assignments]
            if kind != "engine":
                words = [word for each in words for word in ("--set", each)]
            errors = stack.enter_context((home / f"{name}.err").open("w+b"))
            process = stack.enter_context(_running([*command, *words], env=environment, stderr=errors))
            _wait_ready(home / "log" / f"{name}.jsonl", process, Path(errors.name))
            made.processes[kind].append(psutil.Process(process.pid))

        def service(kind: str) -> list[str]:
            return [sys.executable, "-P", "-m", "microserve.services", kind]

        start("index", service("index"), "index", [])
        engine = [sys.executable, "-P", str(PARTS / "instant_engine.py"), str(step_s)]
        for number in range(num_engines):
            start("engine", engine, f"engine-{number}", [f"engine.id=engine-{number}"])
        start("router", service("router"), "router", ["router.id=router"])
        start("gateway", service("gateway"), "gateway", ["gateway.id=gateway"])
        yield made


@contextmanager
def _running(command: list[str], **options: object) -> Iterator[subprocess.Popen[bytes]]:
    process: subprocess.Popen[bytes] = subprocess.Popen(command, **options)  # type: ignore[call-overload]
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def _wait_ready(file: Path, process: subprocess.Popen[bytes], errors: Path) -> None:
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        if file.exists() and any(
            json.loads(line)["event"] == "service.ready" for line in file.read_text().splitlines()
        ):
            return
        if process.poll() is not None:
            raise RuntimeError(f"{file.stem} ended:\n{errors.read_text()}{file.read_text()}")
        time.sleep(0.05)
    raise RuntimeError(f"{file.stem} is not ready after {READY_S:.0f} s")
