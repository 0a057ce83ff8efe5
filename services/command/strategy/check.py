"""``microserve strategy check``: whether a source may be published, without a mesh.

Owns its flags, how mistakes are printed, and the process that the source is run in (check_process.py), whose
time is bounded. Exit code 0: sound; 1: it has mistakes; 2: a flag is wrong.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from microserve.services.command.shared.flags import WrongFlag, index_flags, parameter, talk_to_index
from microserve.services.command.shared.terminal import echo

if TYPE_CHECKING:
    from microserve.protocol.messages.strategy.control import Scalar
    from microserve.services.command.strategy.task import Finding
    from microserve.services.simulation.trial.mistake import Found

DEAF = re.compile(r'^  File "(<strategy [^"]+>)", line (\d+) in ', re.MULTILINE)
"""Where the innermost code of a source stood, as faulthandler says it."""
CHECK_S = 60.0
"""A source that is not through with its check by then never will be."""
MAX_TRIES = 3
"""On a machine that is so busy that a check has no processor for seconds."""


def source_flags(command: click.decorators.FC) -> click.decorators.FC:
    """FILE, ``--name`` and ``--set``: what is checked, or published."""
    file = click.argument("file", type=click.Path(exists=True, path_type=Path))
    name = click.option("--name", help="Name that requests ask for.  [default: the file's]")
    assign = click.option(
        "--set", "assignments", multiple=True, metavar="NAME=VALUE", help="A parameter; may be repeated."
    )
    return file(name(assign(command)))


@click.command()
@source_flags
@click.option("--labels", default="", metavar="A,B,...", help="Of each engine; a+b: two of one engine.")
@click.option("--live", is_flag=True, help="With the engines and labels of the mesh that runs.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@index_flags
def check(
    file: Path,
    name: str | None,
    assignments: tuple[str, ...],
    labels: str,
    live: bool,
    as_json: bool,
    config: str | None,
    index: str | None,
) -> None:
    """Check FILE, or a folder with an __init__.py, as before it is published; no mesh is needed.

    Its code is read, and serves requests in a simulation: long prompts, slow, full and lost engines, two
    routers, late messages. Each mistake is told with its line and what mends it (docs/authoring.md).
    """
    from microserve.protocol.logging.printable import printable_json

    if labels and live:
        raise WrongFlag("--labels is for a mesh that is not there, --live for one that runs")
    engines = (
        [[part for part in each.strip().split("+") if part] for each in labels.split(",")] if labels else []
    )
    if live or index:
        engines = talk_to_index(config, index, lambda client: client.labels()) or [[]]
    parameters = dict(map(parameter, assignments))
    finding = look(name or file.stem, source_of(file), parameters, engines, is_strict=bool(labels))
    if as_json:
        found = [
            {"mistake": m.mistake, "file": m.file, "line": m.line, "text": m.text} for m in finding.mistakes
        ]
        echo(printable_json({"sound": not found, "mistakes": found, "notes": finding.notes}))
        sys.exit(1 if found else 0)
    sys.exit(0 if tell(finding, file) else 1)


def source_of(file: Path) -> str:
    """What is published of a file or folder. Raises :class:`WrongFlag`."""
    from microserve.protocol.errors import ConfigError
    from microserve.services.router.source.files import read_source

    try:
        return read_source(file)
    except ConfigError as error:
        raise WrongFlag(error.detail) from None


def tell(finding: Finding, file: Path) -> bool:
    """Print what was found; whether the source is sound."""
    path = f"{file}/" if file.is_dir() else str(file)
    for line in finding.notes:
        echo(line)
    for each in finding.mistakes:
        echo(f"Error: {each.told(path)}", err=True)
    if not finding.mistakes:
        echo(f"{file}: no mistake found")
    return not finding.mistakes


def look(
    name: str,
    source: str,
    parameters: dict[str, Scalar],
    labels: list[list[str]],
    *,
    dry_run: bool = True,
    is_strict: bool = False,
) -> Finding:
    """What a check of it finds. ``labels``: of each engine; empty: there is no mesh."""
    import subprocess

    import msgspec

    from microserve.services.command.strategy.task import Finding, Task
    from microserve.services.simulation.trial.mistake import Found

    command = [sys.executable, "-P", "-m", "microserve.services.command.strategy.check_process"]
    task = msgspec.json.encode(Task(name, source, parameters, labels, dry_run, is_strict))
    for _ in range(MAX_TRIES):
        try:
            done = subprocess.run(command, input=task, capture_output=True, timeout=CHECK_S, check=False)
        except subprocess.TimeoutExpired:
            late = f"the check did not end within {CHECK_S:g} s: is there an endless loop?"
            return Finding([Found("endless-loop", "", 0, late)])
        if not _is_starved(done.stderr.decode(errors="replace")):
            break
    try:
        return msgspec.json.decode(done.stdout, type=Finding)
    except msgspec.MsgspecError:
        return Finding([_crash(done.returncode, done.stderr.decode(errors="replace"))])


def _is_starved(told: str) -> bool:
    """It was ended for its silence, and stood in no code of the source: it had no processor."""
    return "\nTimeout (" in f"\n{told}" and DEAF.search(told) is None


def _crash(code: int, told: str) -> Found:
    """Why the process ended without a word: by the source's doing."""
    from microserve.services.simulation.trial.blame import file_of
    from microserve.services.simulation.trial.mistake import Found

    stood = DEAF.search(told)
    if "Timeout" in told and stood is not None:
        deaf = "this never ends, and no signal ends it: do less at a time, or let a plan prepare it"
        return Found("endless-loop", file_of(stood[1]) or "", int(stood[2]), deaf)
    last = told.strip().splitlines()[-1:] or ["nothing was said"]
    return Found("raises", "", 0, f"the check ended with code {code}: {last[0]}")
