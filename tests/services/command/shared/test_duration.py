"""Lengths of time as they are typed."""

from __future__ import annotations

import click
import pytest

from microserve.services.command.shared.duration import Duration


@pytest.mark.parametrize(
    ("typed", "seconds"),
    [("2", 2.0), ("2s", 2.0), ("500ms", 0.5), (" 1.5 s ", 1.5), ("1m", 60.0), ("1e-1", 0.1)],
)
def test_a_time_has_a_unit_or_is_of_seconds(typed: str, seconds: float) -> None:
    assert Duration().convert(typed, None, None) == pytest.approx(seconds)


@pytest.mark.parametrize("typed", ["", "s", "2h", "-1", "nan", "inf", "1e999", "2 s 3"])
def test_what_is_no_time_is_refused(typed: str) -> None:
    with pytest.raises(click.BadParameter, match="is no time"):
        Duration().convert(typed, None, None)
