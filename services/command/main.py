"""The ``microserve`` command. Owns names, flags and exit codes; those of more than a few lines are
elsewhere, and each imports what it needs when run.

Exit codes: 0 done, 1 failed, 2 a flag or a setting is wrong.
"""

from __future__ import annotations

import io
import shutil
import sys
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path

import click

from microserve.services.command.model.flags import model_flags
from microserve.services.command.shared.duration import Duration
from microserve.services.command.shared.flags import (
    Flags,
    WrongFlag,
    directory_at_hand,
    directory_flag,
    settings_flags,
)
from microserve.services.command.shared.terminal import Failure, echo, echo_cells

ELSEWHERE = {
    "bench": "bench.command:bench",
    "chat": "chat.command:chat",
    "completion": "completion:completion",
    "doctor": "doctor.command:doctor",
    "engine": "serve.command:engine",
    "explain": "explain.command:explain",
    "gateway": "serve.command:gateway",
    "index": "serve.command:index",
    "key": "key:key",
    "label": "label:label",
    "model": "model.command:model",
    "plan": "plan:plan",
    "profile": "profile.command:profile",
    "ps": "ps:ps",
    "router": "serve.command:router",
    "simulate": "simulate:simulate",
    "strategy": "strategy.group:strategy",
    "top": "top.command:top",
    "usage": "key:usage",
}
"""Commands that have a file of their own: module and name in it, imported when they are asked for."""


class _Commands(click.Group):
    """Finds the commands that are elsewhere; click says which option was meant, and not which command."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *ELSEWHERE})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in ELSEWHERE:
            return super().get_command(ctx, cmd_name)
        module, _, name = ELSEWHERE[cmd_name].partition(":")
        command = getattr(import_module(f"microserve.services.command.{module}"), name)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        known = self.list_commands(ctx)
        if args and args[0] not in known and not args[0].startswith("-"):
            near = get_close_matches(args[0], known, n=1)
            ctx.fail(f"No such command {args[0]!r}." + (f" Did you mean {near[0]!r}?" if near else ""))
        return super().resolve_command(ctx, args)


def _print_version(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version as installed

        echo(f"microserve {installed('microserve')}")
        context.exit()


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Print the version and end.",
)
def main() -> None:
    """LLM inference as a mesh of small services.

    Settings come from --config FILE, then the environment (MICROSERVE_SECTION__FIELD), then --set.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal or a file that has not our characters
            stream.reconfigure(errors="backslashreplace")


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
@model_flags("Model directory, or its name at the Hub (model.path); default: the demo model.")
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


# --- looking and preparing -------------------------------------------------------------------------


@main.command()
@click.option("--request", "request_id", metavar="ID", help="Only this request, across all services.")
@click.option("--service", help="Only this service: engine, router, index, gateway, supervisor.")
@click.option(
    "--slow", "slow_s", type=Duration(), metavar="TIME", help="Only requests that took as long: 2s, 500ms."
)
@click.option(
    "--filter",
    "filters",
    multiple=True,
    metavar="FIELD=VALUE",
    help="Only requests with this key, strategy, engine, code, status (5xx), path or model; may be repeated.",
)
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
    filters: tuple[str, ...],
    why: bool,
    follow: bool,
    directory: Path | None,
    journal: bool,
    output: str,
) -> None:
    """Show requests and events of all services, in order of time: columns on a terminal, else plain lines."""
    from microserve.services.command.tail.command import Filter, fields_of, mesh_logs, show
    from microserve.services.local.event_log import Unreadable

    if journal and directory is not None:
        raise WrongFlag("--journal goes without --dir")
    place = None if journal else directory or mesh_logs()
    if place is not None and not place.is_dir():
        if directory is not None or shutil.which("journalctl") is None:
            raise WrongFlag(f"{place} is not a directory; --dir says where the logs are")
        place = None
    try:
        fields = fields_of(filters)
    except ValueError as error:
        raise WrongFlag(str(error)) from None
    chosen = Filter(request_id=request_id, service=service, slow_s=slow_s, fields=fields)
    is_terminal = sys.stdout.isatty()
    try:
        show(
            place,
            chosen,
            follow=follow,
            as_json=output == "json",
            with_why=why,
            echo=echo,
            echo_cells=echo_cells if is_terminal else None,
            width=shutil.get_terminal_size().columns,
        )
    except (KeyboardInterrupt, BrokenPipeError):
        sys.exit(0)
    except Unreadable as error:
        raise Failure(str(error)) from None


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


@main.command()
def version() -> None:
    """Print the version."""
    from importlib.metadata import version as installed

    echo(f"microserve {installed('microserve')}")


if __name__ == "__main__":
    main()
