"""The state directory: one supervisor at a time, and a dead one deceives nobody."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from microserve.services.local.directory import AlreadyRunning, ChildState, MeshDirectory, MeshState
from microserve.services.local.supervisor import Child, MeshFailed
from microserve.services.local.up import down

HOLD = """
import sys, pathlib, signal
from microserve.services.local.directory import MeshDirectory
{prelude}
with MeshDirectory(pathlib.Path(sys.argv[1])).hold():
    print("held", flush=True)
    signal.pause()
"""


def holder(root: Path, prelude: str = "") -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", HOLD.format(prelude=prelude), str(root)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def state(pid: int) -> MeshState:
    child = Child("index", ["true"], Path("index.jsonl"), Path("index.out"))
    return MeshState(pid, "http://127.0.0.1:8000", "tiny", [ChildState.of(child)])


def test_only_one_supervisor_and_its_pid_is_known(tmp_path: Path) -> None:
    mesh = MeshDirectory(tmp_path / "state")
    assert mesh.supervisor() == 0
    with mesh.hold():
        assert mesh.supervisor() == os.getpid()
        with pytest.raises(AlreadyRunning, match=str(os.getpid())), mesh.hold():
            pass
    assert mesh.supervisor() == 0


def test_a_killed_supervisor_is_not_running(tmp_path: Path) -> None:
    mesh = MeshDirectory(tmp_path)
    with holder(tmp_path) as process:
        assert mesh.supervisor() == process.pid
        process.kill()
    assert mesh.supervisor() == 0
    with mesh.hold():
        pass


def test_state_reads_back(tmp_path: Path) -> None:
    mesh = MeshDirectory(tmp_path)
    assert mesh.read() is None
    mesh.write(state(1))
    mesh.write(state(2))
    assert mesh.read() == state(2)
    (tmp_path / "mesh.json").write_text("{")
    assert mesh.read() is None


def test_down_stops_the_supervisor(tmp_path: Path) -> None:
    mesh = MeshDirectory(tmp_path)
    with holder(tmp_path):
        assert down(mesh, 20.0) == "stopped"
    assert down(mesh, 20.0) == "no mesh runs here"


def test_down_kills_a_supervisor_that_does_not_stop(tmp_path: Path) -> None:
    ignore = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    with (
        holder(tmp_path, ignore) as process,
        pytest.raises(MeshFailed, match="was killed"),
    ):
        down(MeshDirectory(tmp_path), 0.2)
    assert process.returncode == -9


def test_a_state_that_cannot_be_written_is_read_as_stale_until_it_can(tmp_path: Path) -> None:
    mesh, reader = MeshDirectory(tmp_path), MeshDirectory(tmp_path)
    with mesh.hold():
        assert mesh.write(state(1))
        assert reader.read() == state(1)
        (tmp_path / "mesh.new").mkdir()  # what is to be written first cannot be
        assert not mesh.write(state(2))
        found = reader.read()
        assert found is not None and (found.pid, found.stale) == (1, True)
        (tmp_path / "mesh.new").rmdir()
        assert mesh.write(state(2))
        assert reader.read() == state(2)
        (tmp_path / "mesh.new").mkdir()
        assert not mesh.write(state(3))
    found = reader.read()
    assert found is not None and not found.stale, "who could say so is gone"
