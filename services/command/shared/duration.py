"""A length of time as it is typed: ``2``, ``2s``, ``500ms``, ``1m``."""

from __future__ import annotations

import math
import re

import click

UNITS_S = {"": 1.0, "s": 1.0, "ms": 0.001, "m": 60.0}
_TYPED = re.compile(r"(?P<number>[0-9.eE+-]+?)\s*(?P<unit>ms|s|m|)")


class Duration(click.ParamType):  # type: ignore[type-arg]  # generic in newer clicks alone
    """Seconds; not negative."""

    name = "time"

    def convert(
        self, value: str | float, parameter: click.Parameter | None, context: click.Context | None
    ) -> float:
        if isinstance(value, int | float):
            return float(value)
        typed = _TYPED.fullmatch(value.strip())
        try:
            seconds = float(typed["number"]) * UNITS_S[typed["unit"]] if typed else -1.0
        except ValueError:
            seconds = -1.0
        if not 0.0 <= seconds < math.inf:
            self.fail(f"{value!r} is no time, as 2s, 500ms or 1m are", parameter, context)
        return seconds
