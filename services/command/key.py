"""``microserve key`` and ``microserve usage``: API keys of the gateway, and what each name has used.

Owns how the keys' file is written: whole, under a lock, and never with a key in it. What it may say is
gateway/keys/key.py's.
"""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from microserve.services.command.shared.flags import (
    Flags,
    WrongFlag,
    directory_at_hand,
    directory_flag,
    settings_flags,
)
from microserve.services.command.shared.terminal import Failure, echo

if TYPE_CHECKING:
    from microserve.gateway.keys.key import ApiKey

LIMIT = click.IntRange(min=0, max=1 << 53)


@click.group("key")
def key() -> None:
    """API keys with names and limits (gateway.api_keys_file)."""


def _file(flags: Flags, file: Path | None) -> Path:
    named = file or flags.load().gateway.api_keys_file
    if not named:
        raise WrongFlag("which file? --file FILE, or gateway.api_keys_file in the settings")
    return Path(named)


def file_flag(command: Any) -> Any:
    return click.option(
        "--file",
        type=click.Path(path_type=Path, dir_okay=False),
        help="The keys' file.  [default: gateway.api_keys_file]",
    )(command)


@key.command("new")
@click.argument("name")
@file_flag
@click.option("--requests-per-minute", type=LIMIT, default=0, help="0: no limit, as for all of them.")
@click.option("--tokens-per-minute", type=LIMIT, default=0, help="Of prompts and outputs.")
@click.option("--concurrent-streams", type=LIMIT, default=0, help="Answers at a time.")
@click.option("--daily-token-budget", type=LIMIT, default=0, help="From midnight to midnight, UTC.")
@click.option("--model", "models", multiple=True, help="May be used; may be repeated.  [default: all]")
@click.option("--strategy", "strategies", multiple=True, help="May be asked for; may be repeated.  [all]")
@click.option("--priority", type=click.IntRange(-100, 100), default=0, help="Higher ones wait less.")
@click.option("--lossy", is_flag=True, help="KV of its requests may lose something between engines.")
@click.option("--operator", is_flag=True, help="May read /metrics and /view (microserve top).")
@settings_flags
def new(
    config: str | None, assignments: tuple[str, ...], name: str, file: Path | None, **fields: Any
) -> None:
    """Make a key called NAME, print it, once, and write its hash down; gateways take it within a second."""
    from microserve.gateway.keys.key import ApiKey, digest_of, fault_of_name, make_key
    from microserve.protocol.errors import ConfigError

    path = _file(Flags(config, assignments), file)
    if fault := fault_of_name(name):
        raise WrongFlag(f"NAME: {fault}")
    made = make_key()
    try:
        append(path, ApiKey(name=name, sha256=(digest_of(made),), **fields))
    except ConfigError as error:
        raise Failure(str(error)) from None
    except OSError as error:
        raise Failure(f"cannot write {path}: {error.strerror}") from None
    echo(made)


@key.command("list")
@file_flag
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@settings_flags
def list_keys(config: str | None, assignments: tuple[str, ...], file: Path | None, as_json: bool) -> None:
    """Show the names in the keys' file and what each may; the hashes stay where they are."""
    import msgspec

    from microserve.protocol.errors import ConfigError
    from microserve.protocol.logging.printable import printable_json

    path = _file(Flags(config, assignments), file)
    try:
        found = read(path)
    except ConfigError as error:
        raise Failure(str(error)) from None
    shown = [{**msgspec.structs.asdict(each), "sha256": len(each.sha256)} for each in found]
    if as_json:
        echo(printable_json([{**each, "keys": each.pop("sha256")} for each in shown]))
        return
    for fields in shown:
        name, num_keys = fields.pop("name"), fields.pop("sha256")
        words = [f"{field}={msgspec.json.encode(value).decode()}" for field, value in fields.items() if value]
        if num_keys > 1:
            words.append(f"keys={num_keys}")
        echo(f"{name:<24} {ascii(' '.join(words))[1:-1]}".rstrip())


def read(path: Path) -> list[ApiKey]:
    """The keys of a file. Raises :class:`ConfigError`."""
    from microserve.gateway.keys.key import parse_keys
    from microserve.protocol.errors import ConfigError

    try:
        return parse_keys(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: {error}") from None


def append(path: Path, made: ApiKey) -> None:
    """Put another key into the file, which is made if it is not there, for its owner only.

    The file is replaced whole, so that nobody reads half of it; one of two writers waits for the other.
    Raises :class:`ConfigError` when the file is wrong or has the name already, or ``OSError``.
    """
    from microserve.gateway.keys.key import entry_of, parse_keys
    from microserve.protocol.errors import ConfigError

    path = path.resolve()  # a link stays one
    with open(path.with_name(f"{path.name}.lock"), "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        text, mode = "", 0o600
        with suppress(FileNotFoundError):
            mode = path.stat().st_mode & 0o777
            if any(each.name == made.name for each in read(path)):
                raise ConfigError(f"{path} has a key {made.name!r} already: remove its table first")
            text = path.read_text(encoding="utf-8")
        text = f"{text.rstrip()}\n\n{entry_of(made)}" if text.strip() else entry_of(made)
        parse_keys(text, str(path))
        other = path.with_name(f"{path.name}.new")
        descriptor = os.open(other, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        with open(descriptor, "w", encoding="utf-8") as file:
            os.fchmod(descriptor, mode)
            file.write(text)
            file.flush()
            os.fsync(descriptor)
        other.replace(path)


# --- what has been used ------------------------------------------------------------------------------


@click.command("usage")
@click.option("--key", "name", help="Only this name.")
@click.option("--since", metavar="YYYY-MM-DD", default="", help="From this day on (UTC).")
@click.option("--until", metavar="YYYY-MM-DD", default="9999", help="To this day, included.")
@click.option(
    "--file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The gateways' file.  [default: gateway.usage_path, or that of the mesh in --directory]",
)
@click.option("--output", "-o", type=click.Choice(["text", "json"]), default="text", show_default=True)
@directory_flag
@settings_flags
def usage(
    config: str | None,
    assignments: tuple[str, ...],
    name: str | None,
    since: str,
    until: str,
    file: Path | None,
    output: str,
) -> None:
    """Show requests and tokens by day and API key."""
    import sqlite3
    from dataclasses import asdict

    from microserve.gateway.keys.ledger import read_counts
    from microserve.protocol.logging.printable import printable_json
    from microserve.services.local.composition import USAGE

    path = file or Path(Flags(config, assignments).load().gateway.usage_path or directory_at_hand() / USAGE)
    try:
        found = read_counts(path, since=since, until=until)
    except sqlite3.Error as error:
        raise Failure(f"{path}: {error}") from None
    rows = [(day, key, counts) for (day, key), counts in found.items() if name in (None, key)]
    if output == "json":
        for day, key, counts in rows:
            echo(printable_json({"day": day, "key": key, **asdict(counts)}))
        return
    head = f"{'requests':>9} {'refused':>9} {'in':>12} {'cached':>12} {'out':>12}"
    echo(f"{'day':<10} {'key':<24} {head}")
    for day, key, counts in rows:
        numbers = f"{counts.requests:>9} {counts.refused:>9} {counts.prompt_tokens:>12} "
        numbers += f"{counts.cached_tokens:>12} {counts.output_tokens:>12}"
        echo(f"{ascii(day)[1:-1]:<10} {ascii(key or '-')[1:-1]:<24} {numbers}")
