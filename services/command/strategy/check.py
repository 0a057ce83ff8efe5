"""Whether a source may be published: run in a process of its own (check_process.py), in bounded time."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from microserve.services.command.terminal import echo

if TYPE_CHECKING:
    from microserve.protocol.messages.control import Scalar

CHECK_S = 60.0
"""A source that is not through with its check by then never will be."""


def is_sound(
    name: str, source: str, parameters: dict[str, Scalar], labels: list[list[str]], dry_run: bool
) -> bool:
    """Whether the source may be published; says why not."""
    import subprocess

    import msgspec

    from microserve.services.command.strategy.check_process import Finding, Task

    command = [sys.executable, "-P", "-m", "microserve.services.command.strategy.check_process"]
    task = msgspec.json.encode(Task(name, source, parameters, labels, dry_run))
    try:
        done = subprocess.run(command, input=task, capture_output=True, timeout=CHECK_S, check=False)
    except subprocess.TimeoutExpired:
        echo(f"Error: the check did not end within {CHECK_S:g} s: an endless loop?", err=True)
        return False
    try:
        finding = msgspec.json.decode(done.stdout, type=Finding)
    except msgspec.MsgspecError:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["nothing was said"]
        echo(f"Error: the check ended with code {done.returncode}: {last[0]}", err=True)
        return False
    for line in finding.notes:
        echo(line)
    for line in finding.problems:
        echo(f"Error: {line}", err=True)
    return not finding.problems
