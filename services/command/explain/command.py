"""The command: asks every router of the mesh by its index, prints what they remember.

Owns names, flags and exit codes (0 done, 1 nobody remembers the request, 2 a flag is wrong). A strategy to
compare with is run here, under the router's own overseer: a file is code of whoever types the command.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from microserve.services.command.shared.flags import WrongFlag, index_flags, parameter, talk_to_index
from microserve.services.command.shared.terminal import Failure, echo

if TYPE_CHECKING:
    from microserve.protocol.messages.strategy.control import (
        ControlEntry,
        ControlReport,
        Scalar,
        StrategyVersion,
    )
    from microserve.protocol.messages.strategy.decisions import Asked, Explained
    from microserve.services.command.shared.control_client import ControlClient
    from microserve.services.router.authoring.definition import Strategy
    from microserve.services.router.rollout.replay import Replayed
    from microserve.services.router.source.module import Run


@click.command()
@click.argument("request_id", metavar="REQUEST")
@click.option(
    "--strategy",
    "other",
    metavar="NAME|FILE",
    help="Also what this one would decide by what was known then: in force, shipped, or a file.",
)
@click.option(
    "--set", "assignments", multiple=True, metavar="NAME=VALUE", help="A parameter of it; may be repeated."
)
@click.option("--output", "-o", type=click.Choice(["text", "json"]), default="text", show_default=True)
@index_flags
def explain(
    config: str | None,
    index: str | None,
    request_id: str,
    other: str | None,
    assignments: tuple[str, ...],
    output: str,
) -> None:
    """Why REQUEST (its id in x-request-id, in the answer's body or in a log) went where it went."""
    from microserve.protocol.logging.printable import printable_json
    from microserve.services.command.explain.table import as_json, lines

    if assignments and other is None:
        raise WrongFlag("--set is for a --strategy")
    parameters = dict(map(parameter, assignments))

    async def talk(client: ControlClient) -> tuple[Asked, list[Explained], ControlReport | None]:
        return *(await client.explain(request_id)), await client.report() if other is not None else None

    asked, answers, report = talk_to_index(config, index, talk)
    late = sorted({*asked.routers} - {each.router_id for each in answers})
    replayed: dict[str, list[Replayed]] = {}
    if other is not None and report is not None:
        replayed = _replay(other, parameters, answers, report)
    if output == "json":
        echo(printable_json(as_json(answers, replayed)))
    elif any(answer.found for answer in answers):
        echo("\n".join(line for answer in answers for line in lines(answer, replayed)))
    for what, routers in (("did not answer in time", late), ("cannot be asked (of before?)", asked.silent)):
        if routers:
            echo(f"Error: {', '.join(routers)}: {what}", err=True)
    if not any(answer.found for answer in answers):
        raise Failure(_why_nothing(request_id, asked, answers))


def _why_nothing(request_id: str, asked: Asked, answers: list[Explained]) -> str:
    if not asked.routers:
        return "no router watches this index"
    kept = (
        ", ".join(f"{each.router_id} has {each.num_kept} requests" for each in answers) or "nobody answered"
    )
    return f"no router remembers {request_id} ({kept}; router.record_requests says how many are kept)"


def _replay(
    other: str, parameters: dict[str, Scalar], answers: list[Explained], report: ControlReport
) -> dict[str, list[Replayed]]:
    """By request id: what the other strategy decides for each of its attempts that has chosen anything."""
    import asyncio

    from microserve.protocol.errors import ConfigError
    from microserve.protocol.settings.settings import RouterSettings
    from microserve.services.router.oversight.overseer import Overseer
    from microserve.services.router.rollout.replay import replay

    with Overseer(RouterSettings().strategy_budget_s) as overseer:
        try:
            strategy = _strategy(other, report, overseer.call).bind(parameters)
        except ConfigError as error:
            raise WrongFlag(str(error)) from None

        async def go() -> dict[str, list[Replayed]]:
            return {
                each.request_id: [
                    await replay(strategy, each, attempt, overseer) for attempt in each.attempts
                ]
                for answer in answers
                for each in answer.found
            }

        return asyncio.run(go())


def _strategy(other: str, report: ControlReport, run: Run) -> Strategy:
    """A file, what is in force under the name, or what routers come with. Raises :class:`ConfigError`."""
    from microserve.protocol.errors import ConfigError
    from microserve.services.router.rollout.control import load_source
    from microserve.services.router.source.files import read_source
    from microserve.services.router.strategies import BUILT_IN

    if other.endswith((".py", "/")):
        return load_source(read_source(Path(other)), Path(other).stem, run)
    version = _in_force(other, report.state.entries)
    if version is not None and version.source:
        return load_source(version.source, other, run).bind(version.parameters)
    own = [each for each in BUILT_IN if each.name == other]
    if not own:
        known = ", ".join(
            sorted({each.name for each in BUILT_IN} | {e.strategy for e in report.state.entries})
        )
        raise ConfigError(f"no strategy {other} (there are: {known}; a file ends with .py)", field="strategy")
    return own[0].bind(version.parameters if version is not None else {})


def _in_force(name: str, entries: list[ControlEntry]) -> StrategyVersion | None:
    return next((entry.stable for entry in entries if entry.strategy == name), None)
