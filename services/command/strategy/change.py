"""``microserve strategy set``, ``promote``, ``rollback``, ``retire``: changes of what is in force.

Owns their flags, what is said of a change that was made, and its exit code (0 done, 1 failed, 2 a flag or a
setting is wrong). What is said to the index is control_client.py's.
"""

from __future__ import annotations

import sys
from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any

import click

from microserve.services.command.flags import change_flags, parameter, talk_to_index
from microserve.services.command.terminal import echo

if TYPE_CHECKING:
    from microserve.services.command.control_client import Applied, ControlClient


def apply(client: ControlClient, kind: str, name: str, timeout_s: float, **fields: Any) -> Awaitable[int]:
    """Make a change, wait for the routers, say who runs what; the exit code."""

    async def go() -> int:
        version = await client.change(kind, name, **fields)
        echo(f"{kind} {name}: version {version}")
        return tell(await client.applied(version, name, timeout_s), timeout_s)

    return go()


def tell(applied: Applied, timeout_s: float) -> int:
    """Say which routers have applied a change; the exit code."""
    for router in applied.routers:
        echo(f"  {router.router_id}  version {router.version}")
    if not applied.routers:
        echo("  no router watches this index; they take it over when they come")
    if applied.undone:
        echo(f"Error: version {applied.version} is not served: {applied.undone}", err=True)
    elif applied.late:
        late = ", ".join(applied.late)
        echo(f"Error: not applied within {timeout_s:g} s by: {late}", err=True)
    else:
        return 0
    return 1


@click.command("set")
@click.argument("name")
@click.argument("assignments", nargs=-1, required=True, metavar="NAME=VALUE...")
@change_flags
def set_(
    name: str,
    assignments: tuple[str, ...],
    config: str | None,
    index: str | None,
    reason: str,
    timeout_s: float,
) -> None:
    """Change parameters of a strategy, a published one or one that the routers came with."""
    parameters = dict(map(parameter, assignments))
    code = talk_to_index(
        config,
        index,
        lambda client: apply(client, "set", name, timeout_s, parameters=parameters, reason=reason),
    )
    sys.exit(code)


def _move(
    kind: str, name: str, config: str | None, index: str | None, timeout_s: float, reason: str, shadow: bool
) -> None:
    def talk(client: ControlClient) -> Awaitable[int]:
        return apply(client, kind, name, timeout_s, reason=reason, shadow=shadow)

    sys.exit(talk_to_index(config, index, talk))


@click.command()
@click.argument("name")
@click.option("--shadow", is_flag=True, help="The shadow, not the canary.")
@change_flags
def promote(
    name: str, shadow: bool, config: str | None, index: str | None, reason: str, timeout_s: float
) -> None:
    """Let the canary serve all requests."""
    _move("promote", name, config, index, timeout_s, reason, shadow)


@click.command()
@click.argument("name")
@click.option("--shadow", is_flag=True, help="Drop the shadow.")
@change_flags
def rollback(
    name: str, shadow: bool, config: str | None, index: str | None, reason: str, timeout_s: float
) -> None:
    """Drop the canary; without one, go back to the version before."""
    _move("rollback", name, config, index, timeout_s, reason, shadow)


@click.command()
@click.argument("name")
@change_flags
def retire(name: str, config: str | None, index: str | None, reason: str, timeout_s: float) -> None:
    """Take a strategy from control: the routers' own of that name serves, if there is one."""
    _move("retire", name, config, index, timeout_s, reason, False)
