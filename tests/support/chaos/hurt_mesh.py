"""A mesh under ``microserve up`` on a small disk, and what is asked of its processes and sockets from
outside."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from microserve.services.local.directory import MeshDirectory, MeshState

DISK_MB = 48
READY_S = 180.0


@contextmanager
def small_disk(path: Path) -> Iterator[Path]:
    path.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}M", "tmpfs", str(path)],
        check=False,
        capture_output=True,
    )
    if done.returncode != 0:
        raise PermissionError(f"a small disk cannot be mounted: {done.stderr.decode().strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


@contextmanager
def running_mesh(model: Path, disk: Path) -> Iterator[MeshDirectory]:
    settings = [
        *(f"model.path={model}", "model.name=tiny", "mesh.engines=3", "mesh.max_restarts=1000000"),
        *("index.address=tcp://127.0.0.1:0", "router.address=tcp://127.0.0.1:0", "gateway.port=0"),
        *(
            "kvcache.num_blocks=256",
            "kvcache.checksums=true",
            "model.dtype=float32",  # as the oracle
            "bus.liveness=12",
            "log.max_mb=2",
            "log.keep=2",
        ),
    ]
    command = [
        sys.executable,
        "-P",
        "-m",
        "microserve.services",
        "up",
        "--no-demo",
        "--directory",
        str(disk / "mesh"),
    ]
    command += [word for each in settings for word in ("--set", each)]
    mesh = MeshDirectory(disk / "mesh")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment) as process:
        try:
            deadline = time.monotonic() + READY_S
            while not ((state := mesh.read()) is not None and state.ready):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the mesh is not ready: {state}")
                time.sleep(0.1)
            yield mesh
            process.send_signal(signal.SIGTERM)
            if process.wait(60) != 0:
                raise RuntimeError(f"up ended with {process.returncode}")
        finally:
            process.kill()


def fill(path: Path) -> None:
    """To the last byte."""
    for nbytes in (1 << 20, 512):
        with contextlib.suppress(OSError), open(path, "ab", buffering=0) as file:
            while True:
                file.write(bytes(nbytes))


def pids(state: MeshState) -> dict[str, int]:
    return {child.name: child.pid for child in state.children}


def engine_pid(supervisor: int) -> int:
    """Of the sick engine's present life, whatever ``mesh.json`` says."""
    for pid in Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split():
        with contextlib.suppress(OSError):
            if b'engine.id="e2"' in Path(f"/proc/{pid}/cmdline").read_bytes():
                return int(pid)
    return 0


def is_ready(pid: int) -> bool:
    """It has its step thread."""
    with contextlib.suppress(OSError):
        names = [path.read_text().strip() for path in Path(f"/proc/{pid}/task").glob("*/comm")]
        return len(names) > 3
    return False


@asynccontextmanager
async def connection(url: str) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    host, _, port = url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        yield reader, writer
    finally:
        writer.close()


async def read_answer(reader: asyncio.StreamReader) -> int:
    """One answer with a content-length; its status."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
    length = next(line for line in head.splitlines() if line.startswith("content-length:"))
    await reader.readexactly(int(length.partition(":")[2]))
    return int(head.split(" ", 2)[1])
