"""Where two engines for one request pay, in the simulator: loads by strategies, beside ``data_parallel``.

    python benchmarks/crossing.py [--requests 200] [--seeds 2] [--jobs 2] [--json] [--plot docs/img]

Prompts of 30 tokens for each one of the answer, Poisson arrivals, two engines: the paper's shape with an 8B
model on a device by its data sheet, and the demo model on one CPU core as measured (both profiles in
services/simulation/load/timing.py). The load is the share of both engines' time that prefills take, if one
computed nothing else. ``labels``: one engine is labelled ``prefill`` and one ``decode``, as in the paper.
``crossing``: the load from which on a strategy takes longer than ``data_parallel``. No hardware is measured.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from microserve.services.router.strategies import BUILT_IN
from microserve.services.simulation.load.figures.result import PointResult
from microserve.services.simulation.load.point import TOKEN_PARAMETERS, run_point
from microserve.services.simulation.load.task import Point
from microserve.services.simulation.load.timing import profile_of
from microserve.services.simulation.load.trace import drawn

BASE = "data_parallel"
ROLES = (("prefill",), ("decode",))
SIDES: dict[str, tuple[str, tuple[tuple[str, ...], ...]]] = {
    BASE: (BASE, ()),
    "disaggregated, labels": ("disaggregated", ROLES),
    "balanced": ("balanced", ()),
    "balanced, labels": ("balanced", ROLES),
    "balanced_adaptive": ("balanced_adaptive", ()),
    "auto": ("auto", ()),
    "auto, labels": ("auto", ROLES),
}
LOADS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
NUM_ENGINES = 2
STEP_TOKENS = 512


@dataclass(frozen=True)
class Shape:
    profile: str
    prompt_tokens: int
    output_tokens: int
    scale: int

    def prefill_s(self) -> float:
        """Of one prompt that nothing disturbs, in the chunks of an engine."""
        profile, starts = profile_of(self.profile), range(0, self.prompt_tokens, STEP_TOKENS)
        chunks = [(min(STEP_TOKENS, self.prompt_tokens - start), start) for start in starts]
        return sum(profile.step_s([chunk], []) for chunk in chunks)

    def rate(self, load: float) -> float:
        """Requests a second."""
        return load * NUM_ENGINES / self.prefill_s()


SHAPES = {"h200-8b": Shape("h200-8b", 3000, 100, 1), "cpu": Shape("cpu", 600, 20, 1)}


def scaled(strategy: str, scale: int) -> dict[str, Any]:
    """Parameters that count tokens, in simulated ones."""
    (found,) = (each for each in BUILT_IN if each.name == strategy)
    values = found.bind({}).values
    names = TOKEN_PARAMETERS.get(strategy, ()) if scale > 1 else ()
    return {name: max(1, values[name] // scale) for name in names}


def simulated(shape: Shape, side: str, load: float, num_requests: int, seed: int) -> PointResult:
    strategy, labels = SIDES[side]
    given = scaled(strategy, shape.scale)
    requests = drawn(num_requests, shape.prompt_tokens, shape.output_tokens, seed)
    return run_point(
        Point(
            strategy,
            "",
            shape.rate(load),
            requests,
            profile_of(shape.profile),
            NUM_ENGINES,
            labels,
            shape.scale,
            seed,
            {strategy: given} if given else {},
            slo_ttft_s=5.0,
            slo_tpot_s=0.05,
        )
    )


def rows_of(
    shape: Shape, loads: list[float], num_requests: int, seeds: range, jobs: int
) -> list[dict[str, Any]]:
    asked = [(shape, side, load, num_requests, seed) for load in loads for side in SIDES for seed in seeds]
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        results = iter(pool.starmap(simulated, asked, chunksize=1))
    rows = []
    for load in loads:
        base: list[PointResult] = []
        for side in SIDES:
            found = [next(results) for _ in seeds]
            base = base or found
            row = {"profile": shape.profile, "load": load, "rate": float(f"{shape.rate(load):.3g}")}
            row |= {
                "side": side,
                "jct_s": round(statistics.mean(each.jct_s.mean for each in found), 4),
                "ttft_s": round(statistics.mean(each.ttft_s.mean for each in found), 4),
                "jct_ratio": ratio([each.jct_s.mean for each in found], [each.jct_s.mean for each in base]),
                "p99_ratio": ratio([each.jct_s.p99 for each in found], [each.jct_s.p99 for each in base]),
            }
            rows.append(row)
    return rows


def ratio(above: list[float], below: list[float]) -> float:
    return round(statistics.mean(a / b for a, b in zip(above, below, strict=True)), 4)


def crossings(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """By side, the load at which its mean JCT last passes that of ``data_parallel``; None: it does not."""
    found: dict[str, float | None] = {}
    for side in list(SIDES)[1:]:
        points = [(row["load"], row["jct_ratio"]) for row in rows if row["side"] == side]
        found[side] = None
        for (low, before), (high, after) in pairwise(points):
            if before <= 1.0 < after:
                found[side] = round(low + (high - low) * (1.0 - before) / (after - before), 2)
        if points[0][1] > 1.0 and found[side] is None and points[-1][1] > 1.0:
            found[side] = 0.0
    return found


def draw(figures: dict[str, Any], directory: Path) -> None:
    """``crossing.svg``: a panel a profile, a line a strategy."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from microserve.services.simulation.load.figures.plots import STYLE

    profiles = list(dict.fromkeys(row["profile"] for row in figures["rows"]))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.6 * len(profiles), 3.2), layout="constrained")
        panels = figure.subplots(1, len(profiles), sharey=True, squeeze=False)[0]
        for panel, profile in zip(panels, profiles, strict=True):
            for side in SIDES:
                mine = [row for row in figures["rows"] if (row["profile"], row["side"]) == (profile, side)]
                style = {"color": "#777777"} if side == BASE else {"marker": "o", "markersize": 2.5}
                xs, ys = [row["load"] for row in mine], [row["jct_ratio"] for row in mine]
                panel.plot(xs, ys, "--" if "labels" in side else "-", linewidth=1.2, label=side, **style)
            panel.set_title(profile, fontsize=8, fontweight="bold", loc="left")
            panel.set_xlabel("share of two engines' time that prefills take")
            panel.set_ylim(0.6, 2.0)
        panels[0].set_ylabel("mean JCT / data_parallel's")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
        figure.savefig(directory / "crossing.svg", format="svg", metadata={"Date": None, "Creator": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else "")
    parser.add_argument("--only", choices=sorted(SHAPES), help="One of the two profiles.")
    parser.add_argument("--loads", default=",".join(f"{load:g}" for load in LOADS))
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=2, help="Processes.")
    parser.add_argument("--quick", action="store_true", help="40 requests at two loads, one seed.")
    parser.add_argument("--plot", type=Path, help="Directory for crossing.svg.")
    parser.add_argument("--json", action="store_true", help="Print one line of JSON.")
    options = parser.parse_args()
    loads = [float(load) for load in options.loads.split(",")]
    if options.quick:
        loads, options.requests, options.seeds = [0.2, 0.8], 40, 1
    shapes = [SHAPES[options.only]] if options.only else list(SHAPES.values())
    rows: list[dict[str, Any]] = []
    crossed = {}
    for shape in shapes:
        made = rows_of(shape, loads, options.requests, range(options.seeds), options.jobs)
        crossed[shape.profile] = crossings(made)
        rows += made
    figures = {"quick": options.quick, "virtual": True, "rounds": options.seeds, "requests": options.requests}
    figures |= {"crossings": crossed, "rows": rows}
    if options.plot:
        draw(figures, options.plot)
    if options.json:
        print(json.dumps(figures))
        return
    for row in rows:
        print(" ".join(f"{name} {value}" for name, value in row.items()))
    print(crossed)


if __name__ == "__main__":
    main()
