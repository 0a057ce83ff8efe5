"""Tables of docs/benchmarks.md, made anew of the last run of each benchmark in ``*.jsonl`` beside this file.

    python benchmarks/results/tables.py

A section of the page is between ``<!-- NAME -->`` and ``<!-- end of NAME -->``; all else there is written by
hand and stays. A quick run is shown only where there is no other. A new benchmark: a function here that makes
rows of its figures, its name in ``SECTIONS``, and the two marks on the page.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent
PAGE = RESULTS.parents[1] / "docs" / "benchmarks.md"

DECODE_GOALS = {"decode 1": 1.3, "decode 8": 1.2, "decode 32": 1.15}
PREFILL_GOAL = 1.2
SHARE_GOALS = {"decode 1 at 256": 0.8, "decode 8 at 256": 0.5, "decode 32 at 256": 0.4}
"""Of the memory's bound, in bfloat16 on two threads."""
MESH_GOAL, NEIGHBOUR_GOAL = 0.95, 2.1
BUSY = 2
"""Processes a core that want to run, beyond which a wall time says nothing, in turns or not."""


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def spread(three: list[float]) -> str:
    """``median (least-most)``."""
    return f"{number(three[0])} ({number(three[1])}-{number(three[2])})"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows]]


def engine_step(figures: dict[str, Any]) -> list[str]:
    rows = []
    for row in figures["rows"]:
        goal = ""
        if row["dtype"] == "bfloat16" and row["threads"] == 2 and row["step"] in SHARE_GOALS:
            goal = f"≥ {SHARE_GOALS[row['step']]:.0%}"
        rows.append(
            [
                f"{row['dtype']}, {row['threads']}",
                row["step"],
                spread(row["native_ms"]),
                spread(row["transformers_ms"]),
                spread(row["speedup"]),
                number(row["tokens_per_s"]),
                spread(row["memory_gb_s"]) if "memory_gb_s" in row else "",
                f"{row['share']:.0%} ({row['share_of_best']:.0%})" if "share" in row else "",
                spread(row["native_cpu_ms"]) if "cpu_speedup" in row else "",
                spread(row["transformers_cpu_ms"]) if "cpu_speedup" in row else "",
                spread(row["cpu_speedup"]) if "cpu_speedup" in row else "",
                spread(row["cpu_share"]) if "cpu_share" in row else "",
                goal,
            ]
        )
    head = ["dtype, threads", "step", "native ms", "transformers path ms", "speed-up", "native tokens/s"]
    more = ["memory GB/s", "of the bound (best of each)", "native CPU ms", "transformers path CPU ms"]
    return table([*head, *more, "speed-up in CPU time", "of the bound in CPU time", "goal"], rows)


def engine_http(figures: dict[str, Any]) -> list[str]:
    names = [name for name in figures["versions"] if name != "microserve"]
    rows = []
    for row in figures["rows"]:
        goal = DECODE_GOALS.get(row["question"], PREFILL_GOAL)
        cells = [spread(row["tokens_per_s"][name]) for name in ("microserve", *names)]
        rows.append([row["question"], *cells, *(spread(row["ratio"][name]) for name in names), f"≥ {goal}"])
    peers = [f"{name} {figures['versions'][name]}" for name in names]
    head = ["tokens/s", "MicroServe, HTTP", *peers, *(f"ratio to {name}" for name in names), "goal"]
    return [*table(head, rows), *(f"\n{line}." for line in figures["absent"])]


def engine_mesh(figures: dict[str, Any]) -> list[str]:
    rows = [
        [
            f"{row['streams_an_engine']}",
            spread(row["mesh_tokens_per_s"]),
            spread(row["bare_tokens_per_s"]),
            spread(row["share"]),
            f"≥ {MESH_GOAL}",
        ]
        for row in figures["rows"]
    ]
    return table(["streams an engine", "mesh tokens/s", "bare tokens/s", "mesh / bare", "goal"], rows)


def engine_neighbour(figures: dict[str, Any]) -> list[str]:
    rows = [
        [
            row["path"],
            spread(row["quiet_ms"]),
            spread(row["busy_ms"]),
            spread(row["slower"]),
            f"≤ {NEIGHBOUR_GOAL}" if row["path"] == "native" else "",
        ]
        for row in figures["rows"]
    ]
    return table(["path", "quiet ms", "beside a neighbour ms", "slower by", "goal"], rows)


def paper_figure(figures: dict[str, Any]) -> list[str]:
    rows = [
        [
            f"{row['load']:g} ({number(row['rate'])}/s)",
            row["strategy"],
            *(number(row[name][0]) for name in ("jct_mean_s", "ttft_mean_s")),
            *(spread(row[f"{name}_ratio"]) for name in ("jct_mean", "jct_p99", "ttft_mean", "ttft_p99")),
        ]
        for row in figures["rows"]
    ]
    told = (
        f"{figures['requests']} requests a round, prompts of {figures['prompt_tokens']} tokens on average "
        f"to {figures['prompt_tokens'] // 30}, {figures['alone_s']:g} s for one alone.\n"
    )
    head = ["load", "strategy", "JCT mean s", "TTFT mean s", "JCT mean / data_parallel", "JCT P99 /"]
    return [told, *table([*head, "TTFT mean /", "TTFT P99 /"], rows)]


def crossing(figures: dict[str, Any]) -> list[str]:
    made = []
    for profile, crossed in figures["crossings"].items():
        mine = [row for row in figures["rows"] if row["profile"] == profile]
        sides = list(dict.fromkeys(row["side"] for row in mine))[1:]
        rows = []
        for load in dict.fromkeys(row["load"] for row in mine):
            at = {row["side"]: row for row in mine if row["load"] == load}
            base = at.pop("data_parallel")
            cells = [f"{at[side]['jct_ratio']:.2f} ({at[side]['p99_ratio']:.2f})" for side in sides]
            rows.append([f"{load:g} ({number(base['rate'])}/s)", f"{number(base['jct_s'])} s", *cells])
        ends = ["never" if crossed[side] is None else f"{crossed[side]:g}" for side in sides]
        rows.append(["crossing at", "", *ends])
        made += [f"`{profile}`:\n", *table(["load", "data_parallel", *sides], rows), ""]
    return made[:-1]


SECTIONS: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "engine_step": engine_step,
    "engine_http": engine_http,
    "engine_mesh": engine_mesh,
    "engine_neighbour": engine_neighbour,
    "paper_figure": paper_figure,
    "crossing": crossing,
}


def last_run(lines: str) -> dict[str, Any] | None:
    """The last one that was not quick; else the last one."""
    runs: list[dict[str, Any]] = [json.loads(line) for line in lines.splitlines() if line]
    whole = [run for run in runs if not run["figures"].get("quick")]
    return (whole or runs or [None])[-1]  # type: ignore[list-item]


def section(name: str, run: dict[str, Any]) -> str:
    figures = run["figures"]
    began, ended = run["load"]
    told = (
        f"`{run['command']}`, {run['date']} UTC, {run['machine']}, commit {run['commit']}; shared with other "
        f"work (load {began} before, {ended} after), so ratios count. Medians of {figures['rounds']} rounds "
        "(least-most)."
    )
    if figures.get("virtual"):
        told = (
            f"`{run['command']}`, {run['date']} UTC, commit {run['commit']}, in virtual time; means of "
            f"{figures['rounds']} seeds."
        )
    elif max(began, ended) > BUSY * int(run["machine"].split()[0]):
        told += " **It was so busy that of this run only what is in CPU time counts.**"
    return "\n".join([told, "", *SECTIONS[name](figures)]) + "\n"


def replaced(page: str, name: str, text: str) -> str:
    """Raises :class:`ValueError` where the page has not both marks."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"the page has no {begin.strip()} ... {end.strip()}")
    return before + begin + text + end + after


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for name in SECTIONS:
        file = RESULTS / f"{name}.jsonl"
        run = last_run(file.read_text(encoding="utf-8")) if file.is_file() else None
        if run is None:
            print(f"{name}: no run yet", file=sys.stderr)
            continue
        page = replaced(page, name, section(name, run))
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
