"""A real mesh as ``microserve up`` makes it, where other users can see that it is there."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from microserve.protocol.bus.curve import CurveKeys
from microserve.protocol.settings.sources import load_settings
from microserve.services.command.shared.control_client import control_client
from microserve.services.local.directory import MeshDirectory, MeshState
from tests.support.security.intruder import Targets

TIMEOUT_S = 150.0


@dataclass(frozen=True)
class UpMesh:
    directory: MeshDirectory
    state: MeshState
    targets: Targets

    @property
    def cwd(self) -> Path:
        return self.directory.root.parent

    @property
    def pids(self) -> list[int]:
        return [self.state.pid, *(child.pid for child in self.state.children)]

    def keys(self, role: str) -> CurveKeys:
        return CurveKeys.load(Path(self.state.keys) / role)

    def run(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """``microserve ...`` in the mesh's directory."""
        return microserve(self.cwd, *words, **environment)


def microserve(cwd: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "microserve.services", *words],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        stdin=subprocess.DEVNULL,
        check=False,
    )


@contextmanager
def up_mesh(model: Path, *assignments: str, num_engines: int = 2) -> Iterator[UpMesh]:
    home = Path(tempfile.mkdtemp(prefix="mesh-", dir="/tmp"))
    home.chmod(0o755)
    mesh = MeshDirectory(home / ".microserve")
    assignments = (
        *(f"model.path={model}", "model.name=tiny", "kvcache.num_blocks=64"),
        *("index.address=tcp://127.0.0.1:0", "router.address=tcp://127.0.0.1:0", "gateway.port=0"),
        *assignments,
    )
    flags = [word for each in assignments for word in ("--set", each)]
    try:
        done = microserve(home, "up", "--detach", "--engines", str(num_engines), *flags)
        assert done.returncode == 0, done.stdout + done.stderr
        state = mesh.running()
        assert state is not None
        yield UpMesh(mesh, state, asyncio.run(_targets(state)))
    finally:
        if pid := mesh.supervisor():
            os.kill(pid, signal.SIGTERM)
            psutil.Process(pid).wait(TIMEOUT_S)
        shutil.rmtree(home)


async def _targets(state: MeshState) -> Targets:
    overrides = [f"bus.curve_dir={state.keys}", f"index.address={state.index}"]
    async with control_client(load_settings(overrides=overrides)) as client:
        engines = await client.engines()
    public = {role: CurveKeys.load(Path(state.keys) / role).public.decode() for role in ("index", "router")}
    return Targets(state.index, state.router, engines[0], public["index"], public["router"])
