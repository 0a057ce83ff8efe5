"""Rooms of more than a dozen files are told, and those that may hold more are as full as is said of them."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

from tests.test_packaging import ROOT

SCRIPT = ROOT / "tooling/file_length.py"


def complaints(folder: Path) -> str:
    done = subprocess.run([sys.executable, SCRIPT], cwd=folder, capture_output=True, text=True, check=False)
    assert bool(done.stdout) == bool(done.returncode), done.stderr
    return done.stdout


def test_the_thirteenth_file_of_a_room_is_one_too_many(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    room = tmp_path / "room"
    room.mkdir()
    for name in ("__init__", "conftest", *"abcdefghijkl"):
        (room / f"{name}.py").touch()
    assert complaints(tmp_path) == ""
    (room / "m.py").touch()
    assert complaints(tmp_path) == "room: 13 files, more than 12\n"


def test_rooms_that_may_hold_more_do() -> None:
    """An exception that nobody needs any more is no exception."""
    assigned = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse(SCRIPT.read_text()).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    for room, (allowed, reason) in assigned["FULLER"].items():
        files = {path.name for path in (ROOT / room).glob("*.py")} - {"__init__.py", "conftest.py"}
        assert assigned["MAX_FILES"] < len(files) == allowed, room
        assert reason
