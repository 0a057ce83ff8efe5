"""``microserve ps``: how the processes of this directory's mesh are, and whom its index follows.

Owns the lines for people. What there is to say is the supervisor's, and stands in the directory.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from microserve.services.command.shared.flags import directory_at_hand, directory_flag
from microserve.services.command.shared.terminal import echo

if TYPE_CHECKING:
    from microserve.services.local.directory import ChildState, MeshState


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@directory_flag
def ps(as_json: bool) -> None:
    """Show the mesh of this directory; exit code 1 unless all of it is ready."""
    from microserve.protocol.logging.printable import printable_json
    from microserve.services.local.directory import MeshDirectory

    directory = directory_at_hand()
    mesh = MeshDirectory(directory)
    state = mesh.read() if mesh.supervisor() else None
    if as_json:
        echo(printable_json(state))
    elif state is None:
        echo("no mesh runs here: `microserve up` starts one, --directory names another")
    else:
        echo("\n".join(lines(state)))
        if state.stale:
            echo(f"out of date: {directory} could not be written since (is the disk full?)")
    whole = state is not None and all(child.state == "ready" for child in state.children)
    sys.exit(0 if whole else 1)


def lines(state: MeshState) -> Iterator[str]:
    """The mesh, its children, then engines of other people that its index follows."""
    from microserve.services.local.view import describe

    yield f"{state.url}  {state.model}"
    for child in state.children:
        yield describe(child) + _events(child)
    for member in state.foreign:
        said = [f"{member.engine_id:<12}", "followed  ", member.model, f"events {_short(member.events)}"]
        if member.replay:
            said.append(f"replay {_short(member.replay)}")
        yield " ".join(said)


def _events(child: ChildState) -> str:
    """Where an engine tells of its KV cache, for who is to follow it."""
    if child.state != "ready" or "events" not in child.facts:
        return ""
    return f", events {_short(child.facts['events'])}, replay {_short(child.facts.get('replay', ''))}"


def _short(address: str) -> str:
    return address.removeprefix("tcp://")
