"""How much slower a decode of one stream on two threads is beside one busy process, by either path.

    python benchmarks/engine/engine_neighbour.py [--rounds 15] [--json]

The neighbour counts, and is stopped and continued around every measurement. With two cores, three threads
that want to run and fair shares, a step that waits for both of its own takes 1.5 to 2 times as long at best.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys

import torch
from engine_parts.spread import Spread, ratios
from engine_parts.steps import Engine, decode, timed_ms

THREADS = 2
STEPS = 12
"""Of one measurement: longer than the turns in which a kernel deals out a core."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else "")
    parser.add_argument("--model", default="", help="Its directory; default: the demo model.")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="4 rounds.")
    parser.add_argument("--json", action="store_true", help="Print one line of JSON.")
    options = parser.parse_args()
    rounds = 4 if options.quick else options.rounds
    torch.set_num_threads(THREADS)
    engine, kind = Engine(options.model, "bfloat16"), decode(1, 256)
    runners = {"native": engine.native(THREADS), "transformers": engine.transformers()}
    ms: dict[tuple[str, bool], list[float]] = {(name, busy): [] for name in runners for busy in (False, True)}
    neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        for turn in range(-1, rounds):
            for name, runner in runners.items():
                for busy in (False, True) if turn % 2 else (True, False):
                    os.kill(neighbour.pid, signal.SIGCONT if busy else signal.SIGSTOP)
                    taken = timed_ms(runner, kind, STEPS)
                    if turn >= 0:  # before: what is done once
                        ms[name, busy].append(taken)
    finally:
        neighbour.kill()
        neighbour.wait()
    rows = [
        {
            "path": name,
            "quiet_ms": Spread.of(ms[name, False]).as_json(),
            "busy_ms": Spread.of(ms[name, True]).as_json(),
            "slower": ratios(ms[name, True], ms[name, False]).as_json(),
        }
        for name in runners
    ]
    if options.json:
        print(json.dumps({"quick": options.quick, "rounds": rounds, "rows": rows}))
        return
    for row in rows:
        names = ("quiet_ms", "busy_ms", "slower")
        cells = [str(Spread(*row[name])) for name in names]  # type: ignore[misc]
        print(f"{row['path']:<14} quiet {cells[0]} ms, beside a neighbour {cells[1]} ms, slower {cells[2]}")


if __name__ == "__main__":
    main()
