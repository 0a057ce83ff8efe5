"""``microserve strategy``: flags that are wrong, and what they mean when they are right."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from microserve.services.command.main import main
from microserve.services.command.shared.flags import parameter
from microserve.services.command.strategy.ramp import share_of


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ratio=0.3", ("ratio", 0.3)),
        ("count=3", ("count", 3)),
        ("on=true", ("on", True)),
        ("label=decode", ("label", "decode")),
        ('label="3"', ("label", "3")),
        ("label=", ("label", "")),
    ],
)
def test_a_parameter_is_what_toml_reads_or_text(text: str, expected: tuple[str, object]) -> None:
    name, value = parameter(text)
    assert (name, value, type(value)) == (*expected, type(expected[1]))


@pytest.mark.parametrize("text", ["ratio", "=3", "list=[1, 2]", "day=2026-01-01"])
def test_what_is_no_parameter_is_refused(text: str) -> None:
    with pytest.raises(click.ClickException):
        parameter(text)


def test_a_share_is_a_percentage_or_a_fraction() -> None:
    assert (share_of("10%"), share_of("0.1"), share_of("100%"), share_of("1")) == (0.1, 0.1, 1.0, 1.0)
    for wrong in ("0%", "101%", "1.5", "-1", "some", "nan"):
        with pytest.raises(click.ClickException):
            share_of(wrong)


@pytest.mark.parametrize(
    "name", ["publish", "set", "promote", "rollback", "retire", "list", "show", "compare", "history"]
)
def test_every_command_has_help(name: str) -> None:
    result = CliRunner().invoke(main, ["strategy", name, "--help"])
    assert result.exit_code == 0
    assert "--index" in result.output


def test_wrong_flags_exit_2(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("x = 1")
    for words in (
        ["publish", str(file), "--share", "200%"],
        ["publish", str(file), "--set", "ratio"],
        ["publish", str(tmp_path / "absent.py")],
        ["set", "mine"],
        ["list", "--config", str(tmp_path / "absent.toml")],
    ):
        assert CliRunner().invoke(main, ["strategy", *words]).exit_code == 2, words
