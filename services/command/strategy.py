"""``microserve strategy``: publish, look at, change and take back the strategies of a living mesh.

Owns names, flags, what is printed and exit codes (0 done, 1 failed, 2 a flag or a setting is wrong). A source
is run only by strategy_check.py, in a process of its own; what is said to the index is control_client.py's.
"""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from microserve.services.command.flags import (
    WrongFlag,
    change_flags,
    index_flags,
    parameter,
    talk_to_index,
)
from microserve.services.command.terminal import Failure, echo

if TYPE_CHECKING:
    from microserve.protocol.messages.control import ControlEntry, RouterControl, Scalar, StrategyVersion
    from microserve.services.command.control_client import Applied, ControlClient

CHECK_S = 60.0
"""A source that is not through with its check by then never will be."""
BOUND = click.FloatRange(min=0.0)


def share_of(text: str) -> float:
    """``10%`` or ``0.1``."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise WrongFlag(f"--share {text}: a share is above 0% and at most 100%")
    return share


def _apply(client: ControlClient, kind: str, name: str, timeout_s: float, **fields: Any) -> Awaitable[int]:
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


@click.group()
def strategy() -> None:
    """Change how a running mesh serves: publish strategies, try them on a share, take them back."""


@strategy.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--name", help="Name that requests ask for.  [default: the file's]")
@click.option(
    "--set", "assignments", multiple=True, metavar="NAME=VALUE", help="A parameter; may be repeated."
)
@click.option("--share", "share_text", default="100%", show_default=True, help="Below 100%: a canary.")
@click.option(
    "--shadow", is_flag=True, help="Decides about live requests, serves none; see its score in show."
)
@click.option(
    "--max-ttft", "max_ttft_s", type=BOUND, default=0.0, help="Taken back beyond it (seconds, p90)."
)
@click.option("--max-tpot", "max_tpot_s", type=BOUND, default=0.0, help="Likewise, for an output token.")
@click.option(
    "--sticky-by",
    metavar="ATTRIBUTE",
    default="",
    help="Canary or shadow: all requests of one user, tenant, ... alike (gateway.attributes).",
)
@click.option("--no-dry-run", is_flag=True, help="Without serving in the simulation first.")
@change_flags
def publish(
    file: Path,
    name: str | None,
    assignments: tuple[str, ...],
    share_text: str,
    shadow: bool,
    max_ttft_s: float,
    max_tpot_s: float,
    sticky_by: str,
    no_dry_run: bool,
    config: str | None,
    index: str | None,
    reason: str,
    timeout_s: float,
) -> None:
    """Check FILE, log it, and let every router serve by it from its next request on."""
    share = share_of(share_text)
    parameters, chosen = dict(map(parameter, assignments)), name or file.stem
    try:
        source = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise WrongFlag(f"{file}: {error}") from None

    async def talk(client: ControlClient) -> int:
        labels = await client.labels()
        if not _check(chosen, source, parameters, labels, not no_dry_run):
            return 1
        return await _apply(
            client,
            "publish",
            chosen,
            timeout_s,
            source=source,
            parameters=parameters,
            share=share,
            shadow=shadow,
            max_ttft_s=max_ttft_s,
            max_tpot_s=max_tpot_s,
            sticky_by=sticky_by,
            reason=reason,
        )

    sys.exit(talk_to_index(config, index, talk))


def _check(
    name: str, source: str, parameters: dict[str, Scalar], labels: list[list[str]], dry_run: bool
) -> bool:
    """Whether the source may be published; says why not."""
    import subprocess

    import msgspec

    from microserve.services.command.strategy_check import Finding, Task

    command = [sys.executable, "-P", "-m", "microserve.services.command.strategy_check"]
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


@strategy.command("set")
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
        lambda client: _apply(client, "set", name, timeout_s, parameters=parameters, reason=reason),
    )
    sys.exit(code)


def _move(
    kind: str, name: str, config: str | None, index: str | None, timeout_s: float, reason: str, shadow: bool
) -> None:
    def talk(client: ControlClient) -> Awaitable[int]:
        return _apply(client, kind, name, timeout_s, reason=reason, shadow=shadow)

    sys.exit(talk_to_index(config, index, talk))


@strategy.command()
@click.argument("name")
@click.option("--shadow", is_flag=True, help="The shadow, not the canary.")
@change_flags
def promote(
    name: str, shadow: bool, config: str | None, index: str | None, reason: str, timeout_s: float
) -> None:
    """Let the canary serve all requests."""
    _move("promote", name, config, index, timeout_s, reason, shadow)


@strategy.command()
@click.argument("name")
@click.option("--shadow", is_flag=True, help="Drop the shadow.")
@change_flags
def rollback(
    name: str, shadow: bool, config: str | None, index: str | None, reason: str, timeout_s: float
) -> None:
    """Drop the canary; without one, go back to the version before."""
    _move("rollback", name, config, index, timeout_s, reason, shadow)


@strategy.command()
@click.argument("name")
@change_flags
def retire(name: str, config: str | None, index: str | None, reason: str, timeout_s: float) -> None:
    """Take a strategy from control: the routers' own of that name serves, if there is one."""
    _move("retire", name, config, index, timeout_s, reason, False)


# --- looking -----------------------------------------------------------------------------------------


@strategy.command("list")
@index_flags
def list_(config: str | None, index: str | None) -> None:
    """Every strategy and what serves under its name, and which router runs which version."""
    from microserve.protocol.messages.control import ANY

    report = talk_to_index(config, index, lambda client: client.report())
    kept = "" if report.durable else "  (in memory only: index.control_path is not set)"
    echo(f"version {report.state.version}{kept}")
    entries = {entry.strategy: entry for entry in report.state.entries}
    known = {each.strategy for router in report.routers for each in router.serves}
    for name in sorted({*entries, *known}):
        echo("\n".join(_strategy_lines(name, entries.get(name), report.routers)))
    if not report.routers:
        echo("no router watches this index: what they come with is not known here")
    for each in report.state.labels:
        echo(f"engine {each.engine}  labels {' '.join(each.labels) or ANY}")
    for router in report.routers:
        echo(f"{router.router_id}  version {router.version}")
        for fault in router.faults:
            echo(f"  does not run {fault.strategy} {fault.version}: {fault.reason}")


@strategy.command()
@click.argument("name")
@index_flags
def show(name: str, config: str | None, index: str | None) -> None:
    """The versions of NAME in force, their sources, and how a shadow fares."""

    report = talk_to_index(config, index, lambda client: client.report())
    entries = [entry for entry in report.state.entries if entry.strategy == name]
    if not entries:
        raise Failure(f"{name} is not under control")
    echo("\n".join([*_entry_lines(entries[0]), *_score_lines(entries[0], report.routers)]))
    entry = entries[0]
    for kind, version in (("stable", entry.stable), ("canary", entry.canary), ("shadow", entry.shadow)):
        if version is not None and version.source:
            echo(f"\n# --- {kind}, version {version.version}, sha256 {version.digest}\n{version.source}")


@strategy.command()
@click.argument("name", default="")
@click.option("--limit", type=click.IntRange(1, 1000), default=100, show_default=True)
@index_flags
def history(name: str, limit: int, config: str | None, index: str | None) -> None:
    """Who changed what and why, the newest first; of NAME, or of all."""
    from datetime import UTC, datetime

    from microserve.protocol.messages.control import ANY, LABEL

    for record in talk_to_index(config, index, lambda client: client.history(name, limit)):
        at = datetime.fromtimestamp(record.at, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
        values = "".join(f" {key}={value}" for key, value in record.parameters.items())
        share = f" {record.share:.0%}" if record.kind == "publish" else ""
        labels = " " + (" ".join(record.labels) or ANY) if record.kind == LABEL else ""
        shadow = " (shadow)" if record.shadow else ""
        what = f"{record.kind}{shadow} {record.strategy or record.engine}{labels}{share}{values}"
        echo(
            f"{record.version:>6}  {at}  {what}  {record.digest[:12]}  {record.who}  {record.reason}".rstrip()
        )


# --- what is under control, in lines ----------------------------------------------------------------


def _version_line(kind: str, version: StrategyVersion, share: float) -> str:
    values = " ".join(f"{key}={value}" for key, value in version.parameters.items())
    for bound, bound_s in (("TTFT", version.max_ttft_s), ("TPOT", version.max_tpot_s)):
        values += f"  {bound} <= {bound_s:g} s" if bound_s else ""
    values += f"  sticky by {version.sticky_by}" if version.sticky_by else ""
    digest = version.digest[:12] or "(own)"
    return f"{kind:<7}{version.version:>6}  {share:>5.0%}  {digest:<12}  {values}".rstrip()


def _entry_lines(entry: ControlEntry) -> list[str]:
    lines = [entry.strategy]
    if entry.stable is not None:
        lines.append("  " + _version_line("stable", entry.stable, 1 - entry.share))
    else:
        lines.append("  " + f"stable      (what the routers came with)  {1 - entry.share:.0%}")
    if entry.canary is not None:
        lines.append("  " + _version_line("canary", entry.canary, entry.share))
    if entry.shadow is not None:
        lines.append("  " + _version_line("shadow", entry.shadow, entry.shadow_share))
    return lines


def _strategy_lines(name: str, entry: ControlEntry | None, routers: Sequence[RouterControl]) -> list[str]:
    """One strategy: what is in force, whether it is anybody's default, and where it is otherwise."""
    having = [router for router in routers if any(each.strategy == name for each in router.serves)]
    defaults = [router for router in having if router.default_strategy == name]
    mark = _where("default", defaults, routers) if defaults else ""
    [head, *lines] = _entry_lines(entry) if entry is not None else [f"{name:<24}  what the routers came with"]
    lines.insert(0, f"{head}  {mark}".rstrip())
    if entry is None and len(having) < len(routers):
        lines.append(f"  only on {', '.join(router.router_id for router in having)}")
    for router in having:
        for version in next(each.suspended for each in router.serves if each.strategy == name):
            lines.append(f"  suspended on {router.router_id}: version {version or '(own)'} has hung there, "
                         "data_parallel serves instead")  # fmt: skip
    return lines


def _where(what: str, some: Sequence[RouterControl], all_: Sequence[RouterControl]) -> str:
    if len(some) == len(all_):
        return f"({what})"
    return f"({what} on {', '.join(router.router_id for router in some)})"


def _score_lines(entry: ControlEntry, routers: Sequence[RouterControl]) -> list[str]:
    """What the shadow would have done, by router, beside what was done."""
    if entry.shadow is None:
        return []
    lines = [
        f"{'shadow':<16}{'decisions':>10}{'errors':>8}{'same engine':>13}  TTFT  computed  sent (served)"
    ]
    for router in routers:
        for score in router.shadows:
            if (score.strategy, score.version) != (entry.strategy, entry.shadow.version):
                continue
            agreed = score.num_agreed / max(1, score.num_decisions - score.num_errors)
            lines.append(
                f"{router.router_id:<16}{score.num_decisions:>10}{score.num_errors:>8}{agreed:>13.0%}"
                f"  {score.ttft_s:.4f} s ({score.served_ttft_s:.4f} s)"
                f"  {score.computed_tokens:.0f} ({score.served_computed_tokens:.0f})"
                f"  {score.sent_tokens:.0f} ({score.served_sent_tokens:.0f})"
            )
    return lines if len(lines) > 1 else ["shadow: no decision yet"]
