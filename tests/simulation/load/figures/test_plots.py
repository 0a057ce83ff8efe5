"""Plots of results: one panel a strategy, the same bytes each time, and small."""

from __future__ import annotations

import re
from pathlib import Path

from microserve.services.simulation.load.figures.plots import MEASURES, draw
from microserve.services.simulation.load.figures.result import PointResult, Spread

MAX_NBYTES = 200_000


def result(strategy: str, load: float, *, num_served: int = 10) -> PointResult:
    spread = Spread(load, 0.9 * load, 2 * load, 5 * load)
    return PointResult(
        strategy, load, "h200-8b", 4, [], 10, num_served, 0, 0, spread, spread, spread, 1.0, load, 0.1, 2.0,
        9.0, 8, "",
    )  # fmt: skip


def test_every_strategy_has_its_panel(tmp_path: Path) -> None:
    names = [f"strategy_{number}" for number in range(13)]
    results = [result(name, load) for name in names for load in (1.0, 2.0, 4.0, 8.0, 16.0)]
    paths = draw(results, tmp_path / "img")
    assert [path.name for path in paths] == [measure.file for measure in MEASURES]
    for path in paths:
        text = path.read_text(encoding="utf-8")
        assert len(text) < MAX_NBYTES
        titles = re.findall(r">(strategy_\d+)</text>", text)
        assert titles == names
        assert text.count(">p99</text>") == 1  # the legend stands once
    first = [path.read_bytes() for path in paths]
    assert first == [path.read_bytes() for path in draw(results, tmp_path / "img")]


def test_what_served_nothing_is_left_out(tmp_path: Path) -> None:
    results = [result("good", 1.0), result("good", 2.0, num_served=0), result("bad", 1.0, num_served=0)]
    for path in draw(results, tmp_path):
        text = path.read_text(encoding="utf-8")
        assert ">good</text>" in text
        assert ">bad</text>" not in text
