"""Plots of simulated points as SVG: TTFT, TPOT and JCT against load, one small panel for each strategy.

Owns what a plot looks like. Each panel shows one strategy in colour before all the others in grey, so that
thirteen lines can be told apart. Needs matplotlib; knows results, and nothing of how they came about.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from microserve.services.simulation.load.figures.result import PointResult, Spread

MEAN, TAIL, OTHERS = "#1f5fa8", "#d1495b", "#d0d0d0"
NUM_COLUMNS = 4
PANEL_INCHES = (2.4, 1.9)
STYLE: Any = {
    "svg.hashsalt": "microserve",  # ids in the file are the same each time
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#eeeeee",
    "grid.linewidth": 0.6,
}


@dataclass(frozen=True)
class Measure:
    """One file."""

    file: str
    title: str
    unit: float
    """Seconds of one of the axis."""

    def of(self, result: PointResult) -> Spread:
        return {"ttft.svg": result.ttft_s, "tpot.svg": result.tpot_s, "jct.svg": result.jct_s}[self.file]


MEASURES = (
    Measure("ttft.svg", "time to first token, s", 1.0),
    Measure("tpot.svg", "time per output token, ms", 1e-3),
    Measure("jct.svg", "job completion time, s", 1.0),
)


def draw(results: Sequence[PointResult], directory: Path) -> list[Path]:
    """Write one file for each measure; their paths. ``results`` is not empty."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for measure in MEASURES:
        path = directory / measure.file
        with mpl.rc_context(STYLE):
            figure = _figure(results, measure)
            figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
        paths.append(path)
    return paths


def _figure(results: Sequence[PointResult], measure: Measure) -> Figure:
    lines: dict[str, list[PointResult]] = {}
    for result in results:
        if result.num_served:
            lines.setdefault(result.strategy, []).append(result)
    for points in lines.values():
        points.sort(key=lambda point: point.load)
    num_columns = min(NUM_COLUMNS, len(lines))
    num_rows = -(-len(lines) // num_columns)
    width, height = PANEL_INCHES
    figure = Figure(figsize=(width * num_columns, height * num_rows + 0.6), layout="constrained")
    panels = figure.subplots(num_rows, num_columns, sharex=True, sharey=True, squeeze=False)
    for panel, name in zip(panels.flat, lines, strict=False):
        _draw_panel(panel, name, lines, measure)
    for panel in list(panels.flat)[len(lines) :]:
        panel.set_visible(False)
    for column in range(num_columns):
        shown = [panel for panel in panels[:, column] if panel.get_visible()]
        shown[-1].set_xlabel("requests/s")
        shown[-1].tick_params(labelbottom=True)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(f"{measure.title} (log scale), by requests a second", fontsize=9)
    return figure


def _draw_panel(panel: Axes, name: str, lines: dict[str, list[PointResult]], measure: Measure) -> None:
    others = [point for other, points in lines.items() if other != name for point in [*points, None]]
    # One path with gaps: a file with a path for each pair of strategies would be large.
    panel.plot(
        [math.nan if point is None else point.load for point in others],
        [math.nan if point is None else measure.of(point).mean / measure.unit for point in others],
        color=OTHERS,
        linewidth=0.8,
        label="mean of each other strategy",
    )
    loads = [point.load for point in lines[name]]
    for label, color, style, values in (
        ("mean", MEAN, "-", [measure.of(point).mean for point in lines[name]]),
        ("p99", TAIL, "--", [measure.of(point).p99 for point in lines[name]]),
    ):
        shown = [value / measure.unit for value in values]
        panel.plot(loads, shown, style, color=color, linewidth=1.5, marker="o", markersize=2.5, label=label)
    panel.set_title(name, fontsize=8, fontweight="bold", loc="left", pad=3)
    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.yaxis.set_minor_locator(NullLocator())
