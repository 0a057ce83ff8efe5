"""Directories of processes: gone with their owner, whatever happened to it, and never before."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from microserve.protocol.process.scratch import Scratch, sweep

OWNER = """
import signal
from microserve.protocol.process.scratch import Scratch
scratch = Scratch()
(scratch.path / "socket").touch()
print(scratch.path, flush=True)
signal.pause()
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    yield tmp_path
    tempfile.tempdir = None


def test_its_owner_alone_enters_it_and_takes_it_along(temporary: Path) -> None:
    scratch = Scratch()
    assert scratch.path.parent == temporary
    assert scratch.path.stat().st_mode & 0o777 == 0o700
    (scratch.path / "events").touch()
    scratch.close()
    scratch.close()
    assert not list(temporary.iterdir())


def test_what_somebody_holds_or_nobody_made_stays(temporary: Path) -> None:
    scratch = Scratch()
    others = temporary / "microserve-scratch-of-nobody"
    others.mkdir()
    sweep()
    assert scratch.path.exists(), "its owner lives"
    assert others.exists(), "it has no lock: it may be in the making"
    scratch.close()


def test_who_sweeps_bears_that_there_is_no_temporary_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", fail)
    sweep()


@pytest.mark.slow
def test_a_killed_owner_s_is_removed_by_who_sweeps_and_a_living_one_s_is_not() -> None:
    owners = [
        subprocess.Popen([sys.executable, "-P", "-c", OWNER], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    try:
        paths = [Path(owner.stdout.readline().strip()) for owner in owners if owner.stdout]
        os.kill(owners[0].pid, signal.SIGKILL)
        owners[0].wait(60)
        assert [path.exists() for path in paths] == [True, True]
        sweep()
        assert [path.exists() for path in paths] == [False, True]
    finally:
        for owner in owners:
            owner.kill()
            owner.communicate()
