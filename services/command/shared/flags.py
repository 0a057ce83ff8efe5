"""Flags that several commands have, and what becomes of them: settings, or a talk with the index.

Owns where settings come from (file, environment, ``--set``) and that a wrong one ends with exit code 2 and a
line. Knows no single command.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from microserve.services.command.shared.terminal import Failure

if TYPE_CHECKING:
    from microserve.protocol.messages.strategy.control import Scalar
    from microserve.protocol.settings.settings import Settings
    from microserve.services.command.shared.control_client import ControlClient

Command = TypeVar("Command", bound=Callable[..., Any])
T = TypeVar("T")

STATE_DIRECTORY = ".microserve"
_DIRECTORY = "microserve.directory"

APPLIED_S = 5.0
"""For every router to take a change over; they do so between two requests."""


class WrongFlag(Failure):
    """A flag or a setting is wrong."""

    exit_code = 2


class Flags:
    """Where settings come from, as given on the command line."""

    def __init__(self, config: str | None, assignments: tuple[str, ...] = ()) -> None:
        self.config = config
        self.assignments = list(assignments)

    def set(self, path: str, value: Any) -> None:
        """A friendly flag is one more assignment; None: it was not given."""
        if value is not None:
            from microserve.services.local.composition import assignment

            self.assignments.append(assignment(path, value)[1])

    def as_arguments(self) -> list[str]:
        """The same for another ``microserve`` process."""
        config = ["--config", self.config] if self.config else []
        return config + [word for each in self.assignments for word in ("--set", each)]

    def load_beside_mesh(self) -> Settings:
        """As :meth:`load`; where no source names another index, the one of the mesh that runs in the
        directory at hand (``--directory``) is meant, with its keys."""
        import msgspec

        from microserve.services.local.directory import MeshDirectory

        mesh = MeshDirectory(directory_at_hand()).running()
        if mesh is None or not mesh.index:
            return self.load()
        settings = self.load({"index.address": mesh.index})
        if settings.index.address != mesh.index or settings.bus.curve_dir:
            return settings
        bus = msgspec.structs.replace(settings.bus, curve_dir=mesh.keys, insecure=not mesh.keys)
        return msgspec.structs.replace(settings, bus=bus)

    def load(self, fallbacks: Mapping[str, str] | None = None) -> Settings:
        """Raises :class:`WrongFlag`."""
        from microserve.protocol.errors import ConfigError
        from microserve.protocol.settings.sources import CONFIG_VARIABLE, load_settings

        config = self.config if self.config is not None else os.environ.get(CONFIG_VARIABLE) or None
        try:
            return load_settings(
                config, environment=os.environ, overrides=self.assignments, fallbacks=fallbacks
            )
        except ConfigError as error:
            raise WrongFlag(str(error)) from None


def settings_flags(command: Command) -> Command:
    """``--config FILE`` and ``--set section.field=value``."""
    assign = click.option(
        "--set",
        "assignments",
        multiple=True,
        metavar="SECTION.FIELD=VALUE",
        help="Override one setting; may be repeated.",
    )
    config = click.option(
        "--config",
        metavar="FILE",
        help="Settings as TOML (see deploy/microserve.toml); or MICROSERVE_CONFIG.",
    )
    return config(assign(command))


def directory_flag(command: Command) -> Command:
    """``--directory DIR``, for :func:`directory_at_hand`."""

    def keep(context: click.Context, _: click.Parameter, value: Path) -> None:
        context.meta[_DIRECTORY] = value

    return click.option(
        "--directory",
        "mesh_directory",
        type=click.Path(path_type=Path, file_okay=False),
        default=STATE_DIRECTORY,
        show_default=True,
        help="State directory of the mesh that `up` runs.",
        expose_value=False,
        callback=keep,
    )(command)


def directory_at_hand() -> Path:
    context = click.get_current_context(silent=True)
    return Path(context.meta.get(_DIRECTORY, STATE_DIRECTORY) if context else STATE_DIRECTORY)


def index_flags(command: Command) -> Command:
    """``--config FILE``, ``--index ADDRESS`` and ``--directory DIR``."""
    config = click.option("--config", metavar="FILE", help="Settings as TOML (index.address, bus.curve_dir).")
    index = click.option(
        "--index",
        metavar="ADDRESS",
        help="Where the index is.  [default: this directory's mesh's]",
    )
    return config(index(directory_flag(command)))


def change_flags(command: Command) -> Command:
    """Those of :func:`index_flags`, ``--reason TEXT`` and ``--timeout S``."""
    reason = click.option("--reason", default="", help="For the log.")
    timeout = click.option(
        "--timeout",
        "timeout_s",
        type=click.FloatRange(min=0, min_open=True),
        default=APPLIED_S,
        show_default=True,
        help="Seconds for every router to apply it.",
    )
    return index_flags(reason(timeout(command)))


def parameter(text: str) -> tuple[str, Scalar]:
    """``name=value``; a value that reads as TOML is that, anything else is text.

    Raises :class:`WrongFlag`."""
    import tomllib

    name, equals, raw = text.partition("=")
    if not equals or not name.strip():
        raise WrongFlag(f"{text!r} is not name=value")
    try:
        value: object = tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        value = raw
    if not isinstance(value, bool | int | float | str):
        raise WrongFlag(f"{name}: a parameter is a number, a text, true or false")
    return name.strip(), value


def talk_to_index(config: str | None, index: str | None, talk: Callable[[ControlClient], Awaitable[T]]) -> T:
    """What ``talk`` returns; what the index refuses is told in its words, as click's exception."""
    import asyncio

    from microserve.protocol.errors import ConfigError, MeshError
    from microserve.services.command.shared.control_client import control_client

    flags = Flags(config)
    flags.set("index.address", index)
    settings = flags.load_beside_mesh()

    async def go() -> T:
        async with control_client(settings) as client:
            return await talk(client)

    try:
        return asyncio.run(go())
    except ConfigError as error:
        raise WrongFlag(str(error)) from None
    except MeshError as error:
        where = f"{error.field}: " if error.field else ""
        raise Failure(f"{where}{error.detail}") from None
