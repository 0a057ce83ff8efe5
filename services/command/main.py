"""The ``microserve`` command. Owns names, flags and exit codes; each command imports what it needs when run.

Exit codes: 0 done, 1 failed, 2 a flag or a setting is wrong.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import shutil
import sys
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

import click

from microserve.services.command.explain.command import explain as explain_command
from microserve.services.command.flags import (
    Flags,
    WrongFlag,
    directory_at_hand,
    directory_flag,
    settings_flags,
)
from microserve.services.command.key import key as key_group
from microserve.services.command.key import usage as usage_command
from microserve.services.command.label import label as label_command
from microserve.services.command.simulate import simulate as simulate_command
from microserve.services.command.strategy.group import strategy as strategy_group
from microserve.services.command.terminal import Failure, echo

if TYPE_CHECKING:
    from microserve.protocol.process.run import Serve
    from microserve.protocol.settings import Settings


class _Commands(click.Group):
    """click says which option was meant, and not which command."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        known = self.list_commands(ctx)
        if args and args[0] not in known and not args[0].startswith("-"):
            near = get_close_matches(args[0], known, n=1)
            ctx.fail(f"No such command {args[0]!r}." + (f" Did you mean {near[0]!r}?" if near else ""))
        return super().resolve_command(ctx, args)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """LLM inference as a mesh of small services.

    Settings come from --config FILE, then the environment (MICROSERVE_SECTION__FIELD), then --set.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal or a file that has not our characters
            stream.reconfigure(errors="backslashreplace")


# --- one service in this process -------------------------------------------------------------------


def _run(
    service: str,
    flags: Flags,
    load: Callable[[], Serve],
    *,
    joins_mesh: bool = False,
    settings: Settings | None = None,
) -> None:
    settings = settings or (flags.load_beside_mesh() if joins_mesh else flags.load())
    from microserve.protocol.process.run import run_service

    code = run_service(service, settings, load, reload=flags.load)
    with contextlib.suppress(OSError, ValueError):  # nobody reads it any more, perhaps
        sys.stdout.flush()
        sys.stderr.flush()
    # Everything of ours is closed; taking torch down as well would cost seconds at every stop and restart.
    os._exit(code)


@main.command()
@click.option("--model", metavar="DIR", help="Model directory (model.path).")
@click.option("--id", "own_id", help="Name of this engine in the mesh (engine.id).")
@click.option("--device", metavar="cpu|cuda:N", help="Where it computes (engine.device).")
@click.option("--load-format", metavar="auto|random", help="Weights, or random ones (model.load_format).")
@directory_flag
@settings_flags
def engine(
    config: str | None,
    assignments: tuple[str, ...],
    model: str | None,
    own_id: str | None,
    device: str | None,
    load_format: str | None,
) -> None:
    """Run an engine: it holds the model and the KV cache.

    In the directory of a mesh that `up` runs it joins that mesh, unless index.address says otherwise.
    """
    flags = Flags(config, assignments)
    flags.set("model.path", model)
    flags.set("engine.id", own_id)
    flags.set("engine.device", device)
    flags.set("model.load_format", load_format)

    def load() -> Serve:
        from microserve.services.engine.service import run_engine

        return run_engine

    _run("engine", flags, load, joins_mesh=True)


@main.command()
@settings_flags
def index(config: str | None, assignments: tuple[str, ...]) -> None:
    """Run the index: who is in the mesh, and who holds which prefix."""

    def load() -> Serve:
        from microserve.services.index.service import run_index

        return run_index

    _run("index", Flags(config, assignments), load)


@main.command()
@click.option("--strategy", help="Strategy of requests that name none (router.default_strategy).")
@settings_flags
def router(config: str | None, assignments: tuple[str, ...], strategy: str | None) -> None:
    """Run a router: it serves requests by strategies."""
    flags = Flags(config, assignments)
    flags.set("router.default_strategy", strategy)

    def load() -> Serve:
        from microserve.services.router.service import run_router

        return run_router

    _run("router", flags, load)


@main.command()
@click.option("--host", help="Address to listen on (gateway.host).")
@click.option("--port", type=int, help="Port to listen on (gateway.port).")
@click.option("--workers", type=int, help="Processes that share the port (gateway.workers).")
@click.option("--worker", type=int, hidden=True, help="Be that one of them.")
@settings_flags
def gateway(
    config: str | None, assignments: tuple[str, ...], worker: int | None, **given: str | int | None
) -> None:
    """Run a gateway: the OpenAI API over HTTP."""
    from microserve.services.command.gateway import load, settings_of

    flags = Flags(config, assignments)
    for name, value in given.items():
        flags.set(f"gateway.{name}", value)
    settings = settings_of(flags, worker)
    _run("gateway", flags, functools.partial(load, flags, settings, worker), settings=settings)


# --- a running mesh ----------------------------------------------------------------------------------


@main.command()
@click.argument("engine_id", metavar="ENGINE")
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=0, min_open=True),
    help="Seconds to wait.  [default: engine.drain_s + 15]",
)
@directory_flag
@settings_flags
def drain(config: str | None, assignments: tuple[str, ...], engine_id: str, timeout_s: float | None) -> None:
    """Make ENGINE leave the mesh: its running requests go on elsewhere; exit code 1 unless it has left.

    SIGTERM to the engine does the same. It is not started again: that is yours to do.
    """
    import asyncio

    from microserve.protocol.errors import ConfigError
    from microserve.services.command.drain import DrainFailed
    from microserve.services.command.drain import drain as run_drain

    try:
        settings = Flags(config, assignments).load_beside_mesh()
        asyncio.run(run_drain(settings, engine_id, timeout_s, echo))
    except ConfigError as error:
        raise WrongFlag(str(error)) from None
    except DrainFailed as error:
        raise Failure(str(error)) from None


# --- a whole mesh on this machine ------------------------------------------------------------------


@main.command()
@click.option("--model", metavar="DIR", help="Model directory (model.path); default: the demo model.")
@click.option("--engines", type=click.IntRange(min=1), help="Number of engines (mesh.engines).")
@click.option("--port", type=int, help="Port of the gateway (gateway.port); 0: any free one.")
@click.option("--strategy", help="Strategy of requests that name none (router.default_strategy).")
@click.option("--demo/--no-demo", default=True, help="Ask one question when all is ready.")
@click.option("--oneshot", is_flag=True, help="Stop after the demo's answer.")
@click.option("--detach", "-d", is_flag=True, help="Leave the mesh running in the background.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON lines.")
@directory_flag
@settings_flags
def up(
    config: str | None,
    assignments: tuple[str, ...],
    model: str | None,
    engines: int | None,
    port: int | None,
    strategy: str | None,
    demo: bool,
    oneshot: bool,
    detach: bool,
    as_json: bool,
) -> None:
    """Start index, router, engines and gateway; ask one question; supervise until Ctrl-C."""
    if oneshot and (detach or not demo):
        raise click.UsageError("--oneshot goes with neither --detach nor --no-demo")
    flags = Flags(config, assignments)
    flags.set("model.path", model)
    flags.set("mesh.engines", engines)
    flags.set("gateway.port", port)
    flags.set("router.default_strategy", strategy)
    settings = flags.load()
    from microserve.services.local.directory import MeshDirectory
    from microserve.services.local.up import UpOptions
    from microserve.services.local.up import up as run_up
    from microserve.services.local.view import make_view

    options = UpOptions(flags.as_arguments(), demo=demo, oneshot=oneshot, detach=detach)
    sys.exit(run_up(settings, options, MeshDirectory(directory_at_hand()), make_view(as_json=as_json)))


@main.command()
@click.option("--timeout", "timeout_s", default=90.0, show_default=True, help="Seconds before SIGKILL.")
@directory_flag
def down(timeout_s: float) -> None:
    """Stop the mesh that `up` runs in this directory."""
    from microserve.services.local.directory import MeshDirectory
    from microserve.services.local.supervisor import MeshFailed
    from microserve.services.local.up import down as stop

    try:
        echo(stop(MeshDirectory(directory_at_hand()), timeout_s))
    except MeshFailed as error:
        raise Failure(str(error)) from None


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@directory_flag
def ps(as_json: bool) -> None:
    """Show the mesh of this directory; exit code 1 unless all of it is ready."""
    from microserve.protocol.logging.printable import printable_json
    from microserve.services.local.directory import MeshDirectory
    from microserve.services.local.view import describe

    directory = directory_at_hand()
    mesh = MeshDirectory(directory)
    state = mesh.read() if mesh.supervisor() else None
    if as_json:
        echo(printable_json(state))
    elif state is None:
        echo("no mesh runs here")
    else:
        echo("\n".join([f"{state.url}  {state.model}", *map(describe, state.children)]))
        if state.stale:
            echo(f"out of date: {directory} could not be written since (is the disk full?)")
    whole = state is not None and all(child.state == "ready" for child in state.children)
    sys.exit(0 if whole else 1)


# --- looking and preparing -------------------------------------------------------------------------


@main.command()
@click.option("--request", "request_id", metavar="ID", help="Only this request, across all services.")
@click.option("--service", help="Only this service: engine, router, index, gateway, supervisor.")
@click.option("--slow", "slow_s", type=float, metavar="SECONDS", help="Only requests that took as long.")
@click.option("--why", is_flag=True, help="With how engines were chosen; more: microserve explain ID.")
@click.option("--follow", "-f", is_flag=True, help="Go on with what comes.")
@click.option(
    "--dir", "directory", type=click.Path(path_type=Path), help="Where the logs are.  [default: the mesh's]"
)
@click.option("--journal", is_flag=True, help="From the systemd journal; also where there is no directory.")
@directory_flag
@click.option("--output", "-o", type=click.Choice(["text", "json"]), default="text", show_default=True)
def tail(
    request_id: str | None,
    service: str | None,
    slow_s: float | None,
    why: bool,
    follow: bool,
    directory: Path | None,
    journal: bool,
    output: str,
) -> None:
    """Show requests and events of all services, in order of time."""
    from microserve.services.command.tail import Filter, mesh_logs, show
    from microserve.services.local.event_log import Unreadable

    if journal and directory is not None:
        raise WrongFlag("--journal goes without --dir")
    place = None if journal else directory or mesh_logs()
    if place is not None and not place.is_dir():
        if directory is not None or shutil.which("journalctl") is None:
            raise WrongFlag(f"{place} is not a directory; --dir says where the logs are")
        place = None
    chosen = Filter(request_id=request_id, service=service, slow_s=slow_s)
    try:
        show(place, chosen, follow=follow, as_json=output == "json", with_why=why, echo=echo)
    except (KeyboardInterrupt, BrokenPipeError):
        sys.exit(0)
    except Unreadable as error:
        raise Failure(str(error)) from None


@main.group()
def model() -> None:
    """Models to try things with."""


@model.command("fetch")
def model_fetch() -> None:
    """Make the demo model (SmolLM2-135M-Instruct) if it is not there; print its directory."""
    from microserve.services.local.demo.model import FetchFailed, default_cache, fetch
    from microserve.services.local.view import make_view

    view = make_view(as_json=False, stderr=True)
    try:
        echo(fetch(default_cache(os.environ), view.progress))
    except FetchFailed as error:
        raise Failure(str(error)) from None
    finally:
        view.close()


@main.command()
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False))
@click.option("--mesh", is_flag=True, help="A pair for each role of a mesh, each trusted as what it is.")
def keys(directory: Path, mesh: bool) -> None:
    """Make a CURVE key pair in DIRECTORY that trusts itself (for bus.curve_dir)."""
    from microserve.protocol.bus.curve import create_keys, create_mesh_keys
    from microserve.protocol.errors import ConfigError

    try:
        if mesh:
            echo(f"keys of a mesh: {create_mesh_keys(directory)}")
            return
        made = create_keys(directory)
    except ConfigError as error:
        raise WrongFlag(str(error)) from None
    echo(f"public key {made.public.decode()}")
    echo(f"trusted keys: {made.trusted} (add other services' *.key files)")


@main.command()
@settings_flags
def settings(config: str | None, assignments: tuple[str, ...]) -> None:
    """Print the settings in effect as TOML; secrets are masked."""
    from microserve.services.command.settings_text import as_toml

    echo(as_toml(Flags(config, assignments).load()), nl=False)


for each in (strategy_group, key_group, usage_command, label_command, simulate_command, explain_command):
    main.add_command(each)


@main.command()
def version() -> None:
    """Print the version."""
    from importlib.metadata import version as installed

    echo(f"microserve {installed('microserve')}")


if __name__ == "__main__":
    main()
