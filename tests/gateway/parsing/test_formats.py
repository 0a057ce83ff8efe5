"""Texts of formats: none that the format does not have, and all that people write."""

from __future__ import annotations

import calendar
import re

from microserve.gateway.parsing.written.formats import FORMATS


def test_dates_are_those_of_the_calendar() -> None:
    date = re.compile(FORMATS["date"])
    for year in range(10_000):
        assert bool(date.fullmatch(f"{year:04}-01-01")) == (year > 0)
        assert bool(date.fullmatch(f"{year:04}-02-29")) == (year > 0 and calendar.isleap(year))
    for month in range(14):
        for day in range(33):
            is_one = 1 <= month <= 12 and 1 <= day <= calendar.monthrange(2023, month)[1]
            assert bool(date.fullmatch(f"2023-{month:02}-{day:02}")) == is_one
