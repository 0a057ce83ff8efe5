"""A source checked before publishing: ``python -m microserve.services.command.strategy.check_process``.

A process of its own, because the source is run here: whoever starts it (check.py) bounds its time. Reads
a ``Task`` as JSON from stdin and writes a ``Finding`` as JSON to stdout. Knows no mesh but the labels of
its engines.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from typing import Any, NoReturn

import msgspec

from microserve.protocol.errors import MeshError
from microserve.protocol.messages.control import Scalar
from microserve.protocol.settings import RouterSettings
from microserve.services.router.oversight.overseer import Overseer
from microserve.services.router.rollout.control import load_source

MAX_MEMORY_NBYTES = 4 << 30
BASELINE = "data_parallel"


class Task(msgspec.Struct):
    strategy: str
    source: str
    parameters: dict[str, Scalar]
    labels: list[list[str]]
    """Of each engine of the mesh."""
    dry_run: bool = True


class Finding(msgspec.Struct):
    problems: list[str]
    """Empty: it may be published."""
    notes: list[str] = []


def _refuse_sleep(_seconds: object) -> NoReturn:
    raise RuntimeError("time.sleep stops the whole router; await asyncio.sleep instead")


def check(task: Task, overseer: Overseer) -> Finding:
    """Run the source and look at its shape and parameters; then, if wanted, serve with it in a simulation."""
    try:
        load_source(task.source, task.strategy, overseer.call).bind(task.parameters)
    except MeshError as error:
        return Finding([error.detail])
    if not task.dry_run:
        return Finding([])
    try:
        from microserve.services.simulation.faults.dry_run import try_strategy
    except ModuleNotFoundError as error:
        if error.name != "greenlet":
            raise
        return Finding(["the dry run needs greenlet: pip install greenlet, or --no-dry-run to go without"])
    trial = try_strategy(task.strategy, task.source, task.parameters, task.labels, overseer)
    if trial.problems:
        return Finding(trial.problems)
    base = try_strategy(BASELINE, "", {}, task.labels, only_short=True)
    times = f"a request takes {trial.request_s:.3f} s, under {BASELINE} {base.request_s:.3f} s"
    return Finding([], [f"dry run in the simulation: {times}"])


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_NBYTES, MAX_MEMORY_NBYTES))
    task = msgspec.json.decode(sys.stdin.buffer.read(), type=Task)
    # What the strategy prints must not be taken for the finding.
    out = os.dup(1)
    os.dup2(2, 1)
    blocking: Any = time
    blocking.sleep = _refuse_sleep
    with Overseer(RouterSettings().strategy_budget_s) as overseer:
        finding = check(task, overseer)
    os.write(out, msgspec.json.encode(finding))


if __name__ == "__main__":
    main()
