"""What a panel, a row and a board are, whoever draws them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """Grafana's names of its panels."""

    LINES = "timeseries"
    NUMBER = "stat"


class Unit(StrEnum):
    """Grafana's names of units."""

    COUNT = "short"
    SECONDS = "s"
    BYTES = "bytes"
    BYTES_PER_S = "Bps"
    SHARE = "percentunit"
    PER_S = "reqps"
    RATE = "cps"
    """Of anything but requests."""
    TOKENS_PER_S = "tokens/s"
    BLOCKS = "blocks"
    TOKENS = "tokens"
    CORES = "cores"


@dataclass(frozen=True)
class Query:
    expression: str
    legend: str = ""
    """With ``{{label}}``."""
    empty_until: str = ""
    """What must have happened before there is anything to see; empty: a mesh that has served some requests
    shows something."""


@dataclass(frozen=True)
class Panel:
    title: str
    unit: Unit
    says: str
    """What it shows, and what to do when it looks bad."""
    queries: tuple[Query, ...]
    kind: Kind = Kind.LINES
    width: int = 8
    """Of 24."""
    stacked: bool = False
    bad_from: float | None = None
    """From here on it is drawn red."""
    bad_below: float | None = None
    """Below it is; numbers only."""


@dataclass(frozen=True)
class Row:
    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Board:
    uid: str
    title: str
    says: str
    rows: tuple[Row, ...]
    by_strategy: bool = False
    """There is a variable for it."""


def lines(title: str, unit: Unit, says: str, *queries: Query, width: int = 8, stacked: bool = False) -> Panel:
    return Panel(title, unit, says, queries, width=width, stacked=stacked)


def number(
    title: str,
    unit: Unit,
    says: str,
    expression: str,
    *,
    bad_from: float | None = None,
    bad_below: float | None = None,
) -> Panel:
    return Panel(
        title, unit, says, (Query(expression, title),), Kind.NUMBER, 4, bad_from=bad_from, bad_below=bad_below
    )
