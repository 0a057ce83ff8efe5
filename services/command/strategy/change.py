"""``microserve strategy set``, ``promote``, ``rollback``, ``retire``: changes of what is in force.

Owns their flags, what is said of a change that was made, and its exit code (0 done, 1 failed, 2 a flag or a
setting is wrong). What is said to the index is ../shared/control_client.py's.
"""

from __future__ import annotations

import sys
from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any

import click

from microserve.services.command.shared.flags import WrongFlag, change_flags, parameter, talk_to_index
from microserve.services.command.shared.terminal import Failure, echo
from microserve.services.command.strategy.ramp import ramp_flags, ramp_of, share_of

if TYPE_CHECKING:
    from microserve.protocol.messages.strategy.scores import Ramp
    from microserve.services.command.shared.control_client import Applied, ControlClient


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
@click.argument("assignments", nargs=-1, metavar="[NAME=VALUE]...")
@click.option("--share", "share_text", help="Of the canary that runs; a ramp goes on from there.")
@ramp_flags
@click.option("--pause", "act", flag_value="pause", help="Let the canary's ramp wait where it is.")
@click.option("--resume", "act", flag_value="resume", help="Let it go on.")
@click.option("--abort", "act", flag_value="abort", help="End it: the canary keeps its share.")
@change_flags
def set_(
    name: str,
    assignments: tuple[str, ...],
    share_text: str | None,
    ramp_text: str | None,
    every: str | None,
    min_requests: int,
    promote_after: str | None,
    act: str | None,
    config: str | None,
    index: str | None,
    reason: str,
    timeout_s: float,
) -> None:
    """Change parameters of a strategy, a published one or one that the routers came with; or the share of its
    canary, or how that goes on by itself."""
    parameters = dict(map(parameter, assignments))
    ramp = ramp_of(ramp_text, every, min_requests, promote_after)
    wanted = [parameters or None, share_text, ramp, act]
    if sum(each is not None for each in wanted) != 1:
        raise WrongFlag(
            "one of NAME=VALUE..., --share, --ramp or --promote-after, --pause, --resume, --abort"
        )
    share = 1.0 if share_text is None else share_of(share_text)

    async def talk(client: ControlClient) -> int:
        if parameters:
            return await apply(client, "set", name, timeout_s, parameters=parameters, reason=reason)
        if share_text is not None:
            return await apply(client, "share", name, timeout_s, share=share, reason=reason)
        chosen = ramp if act is None else await _acted(client, name, act)
        return await apply(client, "ramp", name, timeout_s, ramp=chosen, reason=reason)

    sys.exit(talk_to_index(config, index, talk))


async def _acted(client: ControlClient, name: str, act: str) -> Ramp | None:
    """The ramp in force as it is to be."""
    from msgspec.structs import replace

    report = await client.report()
    ramp = next((entry.ramp for entry in report.state.entries if entry.strategy == name), None)
    if ramp is None:
        raise Failure(f"{name} has no ramp")
    return None if act == "abort" else replace(ramp, paused=act == "pause")


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
