"""What was measured outlives whoever measured it."""

from __future__ import annotations

from pathlib import Path

import pytest

from microserve.protocol.errors import ConfigError
from microserve.services.command.profile.journal import Journal


def never() -> float:
    raise AssertionError("measured again")


def test_a_second_run_measures_nothing_again(tmp_path: Path) -> None:
    file = tmp_path / "measured"
    with Journal(file, "run") as first:
        assert first.known("ratio", "a", float, lambda: 2.5) == 2.5
        assert first.known("ratio", "a", float, never) == 2.5
    with Journal(file, "run") as second:
        assert second.known("ratio", "a", float, never) == 2.5
        assert second.known("search", "a", float, lambda: 1.5) == 1.5
        assert len(second) == 2


def test_a_line_that_was_broken_off_is_measured_again(tmp_path: Path) -> None:
    file = tmp_path / "measured"
    with Journal(file, "run") as first:
        first.known("ratio", "a", float, lambda: 2.5)
        first.known("ratio", "b", float, lambda: 3.5)
    file.write_bytes(file.read_bytes()[:-7])
    with Journal(file, "run") as second:
        assert second.known("ratio", "a", float, never) == 2.5
        assert second.known("ratio", "b", float, lambda: 4.5) == 4.5
    with Journal(file, "run") as third:
        assert third.known("ratio", "b", float, never) == 4.5


def test_another_run_s_file_is_not_touched(tmp_path: Path) -> None:
    file = tmp_path / "measured"
    with Journal(file, "run"):
        before = file.read_bytes()
    with pytest.raises(ConfigError, match="is of a run of other prompts"):
        Journal(file, "another run")
    assert file.read_bytes() == before
    with pytest.raises(ConfigError, match="cannot write"):
        Journal(tmp_path / "nowhere" / "measured", "run")
