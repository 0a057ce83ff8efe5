"""All built-in strategies in the simulation, on the cut of Mooncake's conversation trace in ``data/``.

    python benchmarks/strategies.py                    a quick look: 100 requests
    python benchmarks/strategies.py --docs [--jobs 2]  the figures of docs/strategies.md, made anew

With ``--docs``: the plots go to docs/img, and the part of the page between the two ``figures`` marks is
replaced. No hardware is measured: services/simulation/load/timing.py says what the times are from.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec

from microserve.services.simulation.load import planner
from microserve.services.simulation.load.figures.result import PointResult
from microserve.services.simulation.load.task import SimulateTask

ROOT = Path(__file__).parents[1]
TRACE = "tests/data/mooncake_conversation_2000.jsonl.gz"
PAGE = ROOT / "docs/strategies.md"
BEGIN, END = "<!-- figures -->\n", "<!-- end of figures -->\n"
LABELS = ["prefill", "prefill", "decode", "decode"]
LOADS = [1.0, 2.0, 3.0, 4.0, 5.0]
TABLE_LOAD = 3.0
NUM_REQUESTS, SCALE = 1000, 4
NAMES = {"ttft.svg": "Time to first token", "tpot.svg": "Time per output token", "jct.svg": "Job completion"}


def simulated(task: SimulateTask) -> list[PointResult]:
    """Its results; ends the program when they cannot be had."""
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "results.jsonl"
        task = msgspec.structs.replace(task, trace=str(ROOT / TRACE), out=str(out))
        code = planner.main([msgspec.json.encode(task).decode()])
        if code:
            sys.exit(code)
        return [msgspec.json.decode(line, type=PointResult) for line in out.read_bytes().splitlines()]


def figures(labelled: Sequence[PointResult], bare: Sequence[PointResult], date: str) -> str:
    """The part of the page that results are shown in. ``bare``: of a mesh without labels."""
    loads = ",".join(f"{load:g}" for load in dict.fromkeys(result.load for result in labelled))
    lines = [
        "```console",
        f"$ microserve simulate --trace {TRACE} --requests {labelled[0].num_requests} \\",
        f"    --scale {labelled[0].scale} --load {loads} --labels {','.join(LABELS)} --plot docs/img",
        "```",
        "",
        *(f"![{name} against load]({Path('img') / file})\n" for file, name in NAMES.items()),
        f"At {TABLE_LOAD:g} requests/s ({date}; mean / p99; goodput: requests/s with a first token in 5 s "
        "and 50 ms a token; reused:",
        "prompt tokens that no engine computed; the last three columns are the same mesh without labels):",
        "",
        "| | TTFT s | TPOT ms | JCT s | goodput | reused | KV sent | TTFT s | JCT s | goodput |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    without = {result.strategy: result for result in bare if result.load == TABLE_LOAD}
    for result in labelled:
        if result.load == TABLE_LOAD:
            lines.append(_row(result, without[result.strategy]))
    return "\n".join(lines) + "\n"


def _row(result: PointResult, bare: PointResult) -> str:
    ttft, tpot, jct = result.ttft_s, result.tpot_s, result.jct_s
    cells = [
        result.strategy,
        f"{ttft.mean:.2f} / {ttft.p99:.1f}",
        f"{tpot.mean * 1e3:.1f} / {tpot.p99 * 1e3:.0f}",
        f"{jct.mean:.2f} / {jct.p99:.1f}",
        f"{result.goodput_per_s:.2f}",
        f"{result.hit_rate:.1%}",
        f"{result.sent_gb:,.0f} GB",
        f"{bare.ttft_s.mean:.2f} / {bare.ttft_s.p99:.1f}",
        f"{bare.jct_s.mean:.2f} / {bare.jct_s.p99:.1f}",
        f"{bare.goodput_per_s:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def write_page(text: str) -> None:
    """Replace what stands between the marks."""
    page = PAGE.read_text(encoding="utf-8")
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        sys.exit(f"{PAGE} has no {BEGIN.strip()} ... {END.strip()}")
    PAGE.write_text(before + BEGIN + text + END + after, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--docs", action="store_true", help="write docs/strategies.md and docs/img")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--requests", type=int, default=100, help="without --docs")
    arguments = parser.parse_args()
    task = SimulateTask(
        trace=TRACE,
        strategies=[],
        loads=[TABLE_LOAD],
        num_requests=arguments.requests,
        jobs=arguments.jobs,
        scale=SCALE,
    )
    if not arguments.docs:
        simulated(task)
        return
    task = msgspec.structs.replace(task, num_requests=NUM_REQUESTS)
    bare = simulated(task)
    task = msgspec.structs.replace(task, loads=LOADS, labels=LABELS, plot=str(ROOT / "docs/img"))
    write_page(figures(simulated(task), bare, datetime.date.today().isoformat()))


if __name__ == "__main__":
    main()
