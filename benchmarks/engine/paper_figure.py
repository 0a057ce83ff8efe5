"""The paper's figure: long prompts on two engines of one thread each, by several strategies, in turns.

    python benchmarks/engine/paper_figure.py [--minutes 22] [--rounds 3] [--requests 60] [--json]

Prompts of 30 tokens for each one of the answer, Poisson arrivals at three loads. One mesh of the native step
in bfloat16 serves everything; a round is the same arrivals and lengths by each strategy, one after the other,
and who goes first rotates. Mean and P99 of JCT (until the last token) and TTFT, as ratios to
``data_parallel`` of the same round. A load is a share of what two engines could serve if each took one
request at a time for as long as one takes alone, which is measured first; so is the length of the prompts:
the longest that keeps the run within ``--minutes``. The original: MicroServe, arXiv 2412.12488 (70B on eight
H100, 3,000 tokens to 100).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence

import numpy as np
from engine_parts.arrivals import Served, poisson, serve
from engine_parts.serving import Mesh, Prompts, mesh
from engine_parts.spread import Spread, ratios
from engine_parts.steps import demo_model

BASE = "data_parallel"
STRATEGIES = (BASE, "balanced", "balanced_adaptive", "auto")
PROMPT_TOKENS = (120, 180, 240, 360, 480, 600, 900, 1200)
INPUT_TO_OUTPUT, NUM_ENGINES = 30, 2
NUM_ALONE = 6
"""Requests one at a time, from whose time loads are made."""
MEASURES = ("jct_mean_s", "jct_p99_s", "ttft_mean_s", "ttft_p99_s")


def measures(served: Sequence[Served]) -> dict[str, float]:
    jcts, ttfts = [each.ended_s for each in served], [each.first_s for each in served]
    values = (np.mean(jcts), np.percentile(jcts, 99), np.mean(ttfts), np.percentile(ttfts, 99))
    return dict(zip(MEASURES, map(float, values), strict=True))


def alone_s(made: Mesh, prompts: Prompts, prompt_tokens: int) -> float:
    """Median JCT of requests that come one at a time."""
    one = poisson(1, 1e9, prompt_tokens, INPUT_TO_OUTPUT, "alone", spread=0.0)
    times = [serve(made.url, one, prompts, BASE)[0].ended_s for _ in range(NUM_ALONE)]
    return statistics.median(times[1:])


def planned_s(alone: float, loads: Sequence[float], num_requests: int, num_plays: int) -> float:
    """Of all plays: arrivals, and half as long again for the last ones."""
    return sum(num_plays * (num_requests / (load * NUM_ENGINES / alone) + 1.5 * alone) for load in loads)


def fitting(made: Mesh, prompts: Prompts, options: argparse.Namespace, loads: Sequence[float]) -> int:
    """The longest prompts that keep the run within its minutes."""
    num_plays = options.rounds * len(STRATEGIES)
    for length in reversed(PROMPT_TOKENS):
        once = poisson(1, 1e9, length, INPUT_TO_OUTPUT, "alone", spread=0.0)
        took = min(serve(made.url, once, prompts, BASE)[0].ended_s for _ in range(2))
        if planned_s(took, loads, options.requests, num_plays) <= 60 * options.minutes:
            return length
    return PROMPT_TOKENS[0]


def play_all(
    made: Mesh, prompts: Prompts, options: argparse.Namespace, rate: float, prompt_tokens: int
) -> dict[str, list[dict[str, float]]]:
    """By strategy, the measures of each round."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in STRATEGIES}
    for turn in range(options.rounds):
        coming = poisson(options.requests, rate, prompt_tokens, INPUT_TO_OUTPUT, f"{options.seed} {turn}")
        for place in range(len(STRATEGIES)):
            strategy = STRATEGIES[(place + turn) % len(STRATEGIES)]
            found[strategy].append(measures(serve(made.url, coming, prompts, strategy)))
    return found


def rows_of(load: float, rate: float, found: dict[str, list[dict[str, float]]]) -> list[dict[str, object]]:
    rows = []
    for strategy, rounds in found.items():
        row: dict[str, object] = {"load": load, "rate": float(f"{rate:.3g}"), "strategy": strategy}
        for name in MEASURES:
            values, base = [each[name] for each in rounds], [each[name] for each in found[BASE]]
            row[name] = Spread.of(values).as_json()
            row[f"{name.removesuffix('_s')}_ratio"] = ratios(values, base).as_json()
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else "")
    parser.add_argument("--model", default="", help="Its directory; default: the demo model.")
    parser.add_argument("--loads", default="0.25,0.5,0.75", help="Shares of what the engines could serve.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=60, help="Of each round, strategy and load.")
    parser.add_argument("--minutes", type=float, default=22.0, help="What prompts are chosen for.")
    parser.add_argument("--prompt-tokens", type=int, default=0, help="0: as --minutes says.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--quick", action="store_true", help="One round of 8 requests of 180 tokens, one load."
    )
    parser.add_argument("--json", action="store_true", help="Print one line of JSON.")
    options = parser.parse_args()
    loads = [float(load) for load in options.loads.split(",")]
    if options.quick:
        options.rounds, options.requests, options.prompt_tokens, loads = 1, 8, 180, [0.5]
    model = demo_model(options.model)
    prompts = Prompts(model, seed=options.seed)
    rows, began = [], time.perf_counter()
    with mesh(model, NUM_ENGINES, 1, "bfloat16") as made:
        for strategy in STRATEGIES:  # whatever is done once, and what rates and links are measured by
            serve(made.url, poisson(4, 4.0, 240, INPUT_TO_OUTPUT, "warm"), prompts, strategy)
        length = options.prompt_tokens or fitting(made, prompts, options, loads)
        alone = alone_s(made, prompts, length)
        plan = planned_s(alone, loads, options.requests, options.rounds * len(STRATEGIES))
        print(f"{length} tokens, {alone:.2f} s alone, {plan / 60:.0f} minutes", file=sys.stderr, flush=True)
        for load in loads:
            rate = load * NUM_ENGINES / alone
            made_rows = rows_of(load, rate, play_all(made, prompts, options, rate, length))
            rows += made_rows
            if not options.json:
                print("\n".join(line_of(row) for row in made_rows), flush=True)
    if options.json:
        figures = {"quick": options.quick, "rounds": options.rounds, "requests": options.requests}
        figures |= {"prompt_tokens": length, "alone_s": float(f"{alone:.3g}")}
        figures |= {"took_s": round(time.perf_counter() - began), "rows": rows}
        print(json.dumps(figures))


def line_of(row: dict[str, object]) -> str:
    names = ("jct_mean", "jct_p99", "ttft_mean", "ttft_p99")
    cells = [f"{name} {Spread(*row[f'{name}_ratio'])}" for name in names]  # type: ignore[misc]
    jct_s = Spread(*row["jct_mean_s"])  # type: ignore[misc]
    return f"{row['load']} ({row['rate']}/s) {row['strategy']:18} JCT {jct_s} s; {', '.join(cells)}"


if __name__ == "__main__":
    main()
