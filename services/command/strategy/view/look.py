"""``microserve strategy list``, ``show``, ``history``: what is in force, how it fares, who has changed it.

Owns their flags; how a strategy looks in lines is table.py's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from microserve.services.command.shared.flags import index_flags, talk_to_index
from microserve.services.command.shared.terminal import Failure, echo
from microserve.services.command.strategy.view.table import (
    entry_lines,
    ramp_line,
    score_lines,
    strategy_lines,
)

if TYPE_CHECKING:
    from microserve.protocol.messages.strategy.control import ControlReport
    from microserve.protocol.messages.strategy.decisions import Asked, Explained
    from microserve.services.command.shared.control_client import ControlClient


@click.command("list")
@index_flags
def list_(config: str | None, index: str | None) -> None:
    """Every strategy and what serves under its name, and which router runs which version."""
    from microserve.protocol.messages.strategy.control import ANY

    report = talk_to_index(config, index, lambda client: client.report())
    kept = "" if report.durable else "  (in memory only: index.control_path is not set)"
    echo(f"version {report.state.version}{kept}")
    entries = {entry.strategy: entry for entry in report.state.entries}
    known = {each.strategy for router in report.routers for each in router.serves}
    for name in sorted({*entries, *known}):
        echo("\n".join(strategy_lines(name, entries.get(name), report.routers)))
    if not report.routers:
        echo("no router watches this index: what they come with is not known here")
    for each in report.state.labels:
        echo(f"engine {each.engine}  labels {' '.join(each.labels) or ANY}")
    for router in report.routers:
        echo(f"{router.router_id}  version {router.version}")
        for fault in router.faults:
            echo(f"  does not run {fault.strategy} {fault.version}: {fault.reason}")


@click.command()
@click.argument("name")
@index_flags
def show(name: str, config: str | None, index: str | None) -> None:
    """The versions of NAME in force, how they and a shadow fare, and their sources."""
    from microserve.services.command.strategy.view.score_table import board_lines

    async def talk(client: ControlClient) -> tuple[ControlReport, Asked, list[Explained]]:
        return await client.report(), *(await client.scores(name))

    report, asked, answers = talk_to_index(config, index, talk)
    entry = next((entry for entry in report.state.entries if entry.strategy == name), None)
    scores = [score for answer in answers for score in answer.scores]
    known = {each.strategy for router in report.routers for each in router.serves}
    if entry is None and name not in known:
        raise Failure(f"{name} is not under control")
    if entry is None:
        echo(f"{name}\n  stable      (what the routers came with)  100%")
    else:
        state = next((state for state in report.ramps if state.strategy == name), None)
        echo("\n".join([*entry_lines(entry, state), *score_lines(entry, report.routers)]))
    echo("\n".join(board_lines(scores)))
    silent = sorted({*asked.silent, *asked.routers} - {answer.router_id for answer in answers})
    if silent:
        echo(f"Error: {', '.join(silent)}: did not say how it fares", err=True)
    if entry is None:
        return
    for kind, version in (("stable", entry.stable), ("canary", entry.canary), ("shadow", entry.shadow)):
        if version is not None and version.source:
            echo(f"\n# --- {kind}, version {version.version}, sha256 {version.digest}\n{version.source}")


@click.command()
@click.argument("name", default="")
@click.option("--limit", type=click.IntRange(1, 1000), default=100, show_default=True)
@index_flags
def history(name: str, limit: int, config: str | None, index: str | None) -> None:
    """Who changed what and why, the newest first; of NAME, or of all."""
    from datetime import UTC, datetime

    from microserve.protocol.messages.strategy.control import ANY, LABEL

    for record in talk_to_index(config, index, lambda client: client.history(name, limit)):
        at = datetime.fromtimestamp(record.at, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
        values = "".join(f" {key}={value}" for key, value in record.parameters.items())
        share = f" {record.share:.0%}" if record.kind in ("publish", "share") else ""
        ramp = f" {ramp_line(record.ramp)}" if record.ramp is not None else ""
        labels = " " + (" ".join(record.labels) or ANY) if record.kind == LABEL else ""
        shadow = " (shadow)" if record.shadow else ""
        what = f"{record.kind}{shadow} {record.strategy or record.engine}{labels}{share}{values}{ramp}"
        echo(
            f"{record.version:>6}  {at}  {what}  {record.digest[:12]}  {record.who}  {record.reason}".rstrip()
        )
