"""A strategy's source checked: ``python -m microserve.services.command.strategy.check_process``.

A process of its own, because the source is run here: whoever starts it (check.py) bounds its time. Reads
a ``Task`` as JSON from stdin and writes a ``Finding`` as JSON to stdout. Knows no mesh but the labels of
its engines.
"""

from __future__ import annotations

import faulthandler
import os
import resource
import sys
from collections.abc import Mapping
from difflib import get_close_matches

import msgspec

from microserve.protocol.errors import ConfigError, MeshError
from microserve.protocol.settings.settings import RouterSettings
from microserve.protocol.strategy_source import TOP, unpacked
from microserve.services.command.strategy.task import Finding, Task
from microserve.services.router.oversight.mistake import place_of
from microserve.services.router.oversight.overseer import Overseer
from microserve.services.router.oversight.stuck import StuckTrace
from microserve.services.router.rollout.control import load_source
from microserve.services.simulation.trial.blame import Told, blame, file_of
from microserve.services.simulation.trial.mistake import Found
from microserve.services.simulation.trial.reading import labels_in, read
from microserve.services.simulation.trial.refusal import Refusals

MAX_MEMORY_NBYTES = 4 << 30
BASELINE = "data_parallel"
USUAL_LABELS = ("prefill", "decode")
"""Of a mesh that is not there."""
DEAF_S = 5.0
ALIKE = 0.75
"""A label that is so much like another one is taken for a slip."""


def check(task: Task, overseer: Overseer) -> Finding:
    """Run the source and look at its shape and parameters; then, if wanted, read it, and serve with it in a
    simulation. What reading finds is told alone: most of what follows would come of it."""
    sources = {TOP: task.source}
    try:
        sources = unpacked(task.source)
        load_source(task.source, task.strategy, overseer.call).bind(task.parameters)
    except MeshError as error:
        return Finding([_unloadable(error, sources)])
    if not task.dry_run:
        return Finding([])
    try:
        from microserve.services.simulation.trial.dry_run import try_strategy
    except ModuleNotFoundError as error:
        if error.name != "greenlet":
            raise
        missing = "the dry run needs greenlet: pip install greenlet, or --no-dry-run to go without"
        return Finding([Found("unloadable", "", 0, missing)])
    labels, wrong, notes = _labels(task, sources)
    if found := read(sources) + wrong:
        return Finding(found, notes)
    Refusals().begin()
    trial = try_strategy(task.strategy, task.source, task.parameters, labels, overseer)
    if trial.found:
        return Finding(trial.found, notes)
    base = try_strategy(BASELINE, "", {}, labels, only_short=True)
    times = f"a request takes {trial.request_s:.3f} s, under {BASELINE} {base.request_s:.3f} s"
    return Finding([], [*notes, *trial.notes, f"dry run in the simulation: {times}"])


def _unloadable(error: MeshError, sources: Mapping[str, str]) -> Found:
    """Why it cannot be loaded, with the line where Python, or the shape of a strategy, says so."""
    cause = error.__cause__
    place = place_of(cause)
    if isinstance(cause, SyntaxError) and cause.filename and cause.filename.startswith("<strategy"):
        place = f"{cause.filename}:{cause.lineno}"
    said = f"{type(cause).__name__}: {cause}" if cause is not None else error.detail
    found = blame(Told(said, place), sources, file_of)
    if found.mistake == "raises":
        kind = "shape" if isinstance(error, ConfigError) and cause is None else "unloadable"
        return Found(kind, found.file, found.line, said)
    return found


def _labels(task: Task, sources: Mapping[str, str]) -> tuple[list[list[str]], list[Found], list[str]]:
    """The engines' labels for the dry run; those that the source asks for and nobody has, as mistakes, and as
    notes where that is no mistake: labels are preferences."""
    asked = labels_in(sources, task.parameters)
    known = {label for each in task.labels for label in each} or set(USUAL_LABELS)
    serve_all = bool(task.labels) and not all(task.labels)
    wrong: list[Found] = []
    notes: list[str] = []
    own: list[str] = []
    for label, (file, line) in asked.items():
        if label in known or serve_all:
            continue
        near = get_close_matches(label, known, n=1, cutoff=ALIKE)
        has = ", ".join(sorted(known))
        mend = f"is {near[0]!r} meant?" if near else "any engine serves it, unless `strict` is set"
        if near or task.is_strict:
            told = f"no engine has the label {label!r} (there are: {has}): {mend}"
            wrong.append(Found("nobodys-label", file, line, told))
        elif task.labels:
            notes.append(f"no engine has the label {label!r} (there are: {has}): {mend}")
        else:
            own.append(label)
    if own:
        notes.append(f"engines had the labels {', '.join(own)} here; --labels or --live says what yours have")
    usual = [["prefill", *own[::2]], ["decode", *own[1::2]], ["decode", *own]]
    return task.labels or usual, wrong, notes


class _Alarm(StuckTrace):
    """Ends this process, and says where it stood, when nothing has come from its main thread for ``DEAF_S``:
    code in C that never asks for signals."""

    def __init__(self) -> None:
        """Nothing is kept in a file."""

    def alive(self) -> None:
        faulthandler.dump_traceback_later(DEAF_S, exit=True)


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_NBYTES, MAX_MEMORY_NBYTES))
    task = msgspec.json.decode(sys.stdin.buffer.read(), type=Task)
    # What the strategy prints must not be taken for the finding.
    out = os.dup(1)
    os.dup2(2, 1)
    with Overseer(RouterSettings().strategy_budget_s, _Alarm()) as overseer:
        finding = check(task, overseer)
    os.write(out, msgspec.json.encode(finding))
    os._exit(0)  # threads and tasks that the source has left would go on


if __name__ == "__main__":
    main()
