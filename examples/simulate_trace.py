"""A trace of requests through a mesh that does not exist: strategies compared in virtual time.

    python examples/simulate_trace.py [--load 4] [--engines 4]

Routers, schedulers and KV pools are the real ones; the time of steps and transfers is a model. For a trace
of your own: ``microserve simulate --trace FILE``. Needs the extra ``simulation``, as ``make up`` installs it.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from tempfile import TemporaryDirectory

from microserve.services.simulation.load.figures.table import HEADER, line_of
from microserve.services.simulation.load.planner import points_of
from microserve.services.simulation.load.point import run_point
from microserve.services.simulation.load.task import SimulateTask

BLOCK = 512
"""Tokens that one hash id of a trace names."""


def write_trace(path: Path, num_requests: int) -> None:
    """Conversations: a turn's prompt begins with all of the turn before it, hash ids included."""
    rng = random.Random(0)
    with path.open("w") as file:
        for number in range(num_requests):
            talk, turn = rng.randrange(8), rng.randrange(1, 6)
            line = {
                "timestamp": number * 250,
                "input_length": turn * 2 * BLOCK,
                "output_length": rng.randrange(50, 250),
                "hash_ids": [talk * 100 + block for block in range(turn * 2)],
            }
            file.write(json.dumps(line) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--load", type=float, default=4.0, help="requests a second")
    parser.add_argument("--engines", type=int, default=4)
    parser.add_argument("--requests", type=int, default=40)
    arguments = parser.parse_args()
    with TemporaryDirectory() as directory:
        trace = Path(directory) / "trace.jsonl"
        write_trace(trace, arguments.requests)
        task = SimulateTask(
            trace=str(trace),
            strategies=["data_parallel", "cache_aware", "balanced_adaptive"],
            loads=[arguments.load],
            num_engines=arguments.engines,
        )
        print(HEADER)
        for point in points_of(task):
            print(line_of(run_point(point)), flush=True)


if __name__ == "__main__":
    main()
