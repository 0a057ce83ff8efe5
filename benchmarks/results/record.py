"""Run a benchmark and keep its figures: one line of ``NAME.jsonl`` beside this file.

    python benchmarks/results/record.py NAME [ARGUMENT ...]

Runs ``benchmarks/*/NAME.py ARGUMENT ... --json``, prints its line, and appends it with date, command, commit,
machine, and how many processes wanted to run there before and after. Exits with the benchmark's status.
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent
BENCHMARKS = RESULTS.parent


def machine() -> str:
    """``2 cores, AMD EPYC``."""
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        if line.startswith("model name")
    ]
    return f"{os.cpu_count()} cores, {models[0] if models else 'unknown'}"


def commit() -> str:
    """Of the checkout; with a ``+`` where something in it has been changed since. Empty: not a checkout."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=RESULTS, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    # Other runs' figures are no change of what is measured.
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":!/benchmarks/results")
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")


def last_json(output: str) -> dict[str, Any] | None:
    """Of what a benchmark printed: libraries may have said something as well."""
    for line in reversed(output.splitlines()):
        if line.startswith("{"):
            return json.loads(line)  # type: ignore[no-any-return]
    return None


def append(directory: Path, name: str, run: dict[str, Any]) -> None:
    line = json.dumps(run, ensure_ascii=False, separators=(",", ":")) + "\n"
    with (directory / f"{name}.jsonl").open("a", encoding="utf-8") as file:
        file.write(line)


def main(words: list[str]) -> int:
    name, *arguments = words
    found = [*BENCHMARKS.glob(f"{name}.py"), *BENCHMARKS.glob(f"*/{name}.py")]
    if not found:
        sys.exit(f"there is no {name}.py in {BENCHMARKS} or its rooms")
    script = found[0]
    run: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M"),
        "command": " ".join(["python", str(script.relative_to(BENCHMARKS.parent)), *arguments]),
        "commit": commit(),
        "machine": machine(),
        "load": [round(os.getloadavg()[0], 1)],
    }
    done = subprocess.run(
        [sys.executable, script, *arguments, "--json"], stdout=subprocess.PIPE, text=True, check=False
    )
    figures = last_json(done.stdout)
    if done.returncode or figures is None:
        print(done.stdout, end="")
        return done.returncode or 1
    run["load"].append(round(os.getloadavg()[0], 1))
    run["figures"] = figures
    append(RESULTS, name, run)
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1:]))
