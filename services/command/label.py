"""``microserve label``: give an engine of a living mesh other labels, take them back, or list them.

Owns names, flags, what is printed and exit codes (0 done, 1 failed, 2 a flag or a setting is wrong). To label
is a change like those of strategies (WIRE.md 6.4): the index logs it, routers go by it from the next pick on.
The engine is not asked: what an operator says of it holds for its next life too.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from microserve.services.command.shared.flags import WrongFlag, change_flags, talk_to_index
from microserve.services.command.shared.terminal import Failure, echo
from microserve.services.command.strategy.change import tell

if TYPE_CHECKING:
    from microserve.protocol.messages.engine import EngineInfo
    from microserve.protocol.messages.strategy.control import EngineLabels
    from microserve.services.command.shared.control_client import ControlClient


@click.command()
@click.argument("engine", default="")
@click.argument("labels", nargs=-1, metavar="[LABEL...]")
@click.option("--reset", is_flag=True, help="Back to what the engine announces.")
@click.option("--force", is_flag=True, help="Also for an engine that is not in the mesh (yet).")
@click.option("--list", "is_list", is_flag=True, help="Show all engines and their labels.")
@change_flags
def label(
    engine: str,
    labels: tuple[str, ...],
    reset: bool,
    force: bool,
    is_list: bool,
    config: str | None,
    index: str | None,
    reason: str,
    timeout_s: float,
) -> None:
    """Give ENGINE other labels: prefill, decode, names of your own; "any" for none: it serves every label.

    Every router goes by them from its next pick on; running requests are untouched. They stay until they are
    changed or reset, also when the engine, a router or the index restarts.
    """
    if is_list:
        if engine or reset:
            raise WrongFlag("--list goes with nothing else")
        echo("\n".join(talk_to_index(config, index, _table)))
        return
    if not engine or bool(labels) == reset:
        raise WrongFlag("microserve label ENGINE LABEL..., or ENGINE --reset, or --list")
    chosen = _chosen(labels)

    async def talk(client: ControlClient) -> int:
        from microserve.protocol.messages.strategy.control import ANY, LABEL, UNLABEL

        if not reset and not force:
            await _check_member(client, engine)
        kind = UNLABEL if reset else LABEL
        version = await client.change(kind, engine=engine, labels=chosen, reason=reason)
        what = "reset" if reset else " ".join(chosen) or ANY
        echo(f"label {engine} {what}: version {version}")
        if chosen and not {"prefill", "decode"} & set(chosen):
            echo(
                "  neither prefill nor decode: strategies that ask for these (auto, balanced, ...) "
                "use it only while no other engine has them"
            )
        return tell(await client.applied(version, "", timeout_s), timeout_s)

    sys.exit(talk_to_index(config, index, talk))


def _chosen(labels: Sequence[str]) -> list[str]:
    from microserve.protocol.messages.strategy.control import ANY, fault_of_labels

    chosen = [] if list(labels) == [ANY] else list(labels)
    if fault := fault_of_labels(chosen):
        raise WrongFlag(fault)
    return chosen


async def _check_member(client: ControlClient, engine: str) -> None:
    """A guard against typing errors and no rule: an engine may be about to come, so ``--force`` goes past."""
    known = [info.engine_id for info in await client.engines()]
    if engine not in known:
        raise Failure(
            f"no engine {engine} in the mesh (there are: {', '.join(known) or 'none'}); "
            "--force if it is to come"
        )


# --- looking -----------------------------------------------------------------------------------------


async def _table(client: ControlClient) -> list[str]:
    report = await client.report()
    return rows(await client.engines(), report.state.labels)


def rows(present: Sequence[EngineInfo], chosen: Sequence[EngineLabels]) -> list[str]:
    """A line for each engine that is in the mesh or whose labels are set."""
    from microserve.protocol.messages.strategy.control import ANY

    def text(labels: Sequence[str] | None) -> str:
        return "-" if labels is None else " ".join(labels) or ANY

    announced = {info.engine_id: info.labels for info in present}
    by_operator = {each.engine: each.labels for each in chosen}
    table = [("ENGINE", "LABELS", "SET BY", "ANNOUNCED")]
    for engine in sorted(announced.keys() | by_operator.keys()):
        said, own = by_operator.get(engine), announced.get(engine)
        table.append(
            (
                engine,
                text(own if said is None else said),
                "engine" if said is None else "operator",
                "(not in the mesh)" if own is None else text(own),
            )
        )
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]
