"""Flags of ramps: what they mean, and what is refused before anybody is asked."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from microserve.protocol.messages.strategy.scores import Ramp
from microserve.services.command.main import main
from microserve.services.command.strategy.ramp import MIN_REQUESTS, ramp_of, seconds_of


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (("1%,10%,100%", "5m", 7, None), Ramp([0.01, 0.1, 1.0], 300.0, 7)),
        (("10%, 0.5", None, MIN_REQUESTS, "better"), Ramp([0.1, 0.5], 300.0, 20, "better")),
        ((None, None, MIN_REQUESTS, "200"), Ramp([1.0], 0.0, 200)),
        ((None, None, MIN_REQUESTS, "10m"), Ramp([1.0], 600.0, 20)),
        ((None, None, MIN_REQUESTS, "not-worse"), Ramp([1.0], 0.0, 20, "not_worse")),
        ((None, None, MIN_REQUESTS, None), None),
    ],
)
def test_what_the_flags_mean(
    given: tuple[str | None, str | None, int, str | None], expected: Ramp | None
) -> None:
    assert ramp_of(*given) == expected


@pytest.mark.parametrize(
    "given",
    [
        ("10%,5%", None, 20, None),
        ("10%,110%", None, 20, None),
        ("", None, 20, None),
        ("10%", "soon", 20, None),
        ("10%,100%", None, 20, "200"),
        (None, "5m", 20, None),
        (None, "5m", 20, "200"),
        (None, None, 20, "tomorrow"),
        (None, None, 20, "-5"),
        ("10%,100%", "0", 0, None),
    ],
)
def test_what_they_cannot_mean(given: tuple[str | None, str | None, int, str | None]) -> None:
    with pytest.raises(click.ClickException):
        ramp_of(*given)


def test_times() -> None:
    found = [seconds_of(text, "--every") for text in ("90", "1.5s", "5m", "2h", "1d")]
    assert found == [90.0, 1.5, 300.0, 7200.0, 86_400.0]


def test_flags_that_do_not_go_together_exit_2(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("x = 1")
    for words in (
        ["set", "mine", "--share", "20%", "ratio=1"],
        ["set", "mine", "--pause", "--ramp", "10%,100%"],
        ["set", "mine", "--share", "120%"],
        ["publish", str(file), "--promote-after", "200"],
        ["publish", str(file), "--share", "100%", "--ramp", "10%,100%"],
        ["publish", str(file), "--shadow", "--ramp", "10%,100%"],
    ):
        assert CliRunner().invoke(main, ["strategy", *words]).exit_code == 2, words
