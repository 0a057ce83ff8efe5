"""An API key as the operator wrote it down: its name, its digests, what it may and how much.

Owns the format of the keys' file (``gateway.api_keys_file``). The key itself is in no file, no log and no
message: it is shown once, when it is made, and only its SHA-256 is kept. Keys are long and random, so a plain
hash of them tells nothing and costs nothing to check.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import tomllib
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from microserve.protocol.errors import ConfigError
from microserve.protocol.messages.request.attributes import MAX_PRIORITY
from microserve.protocol.settings.faults import did_you_mean, printable, wrong_value

PREFIX = "ms-"
"""Of every key that we make: scanners for leaked secrets know what they look at."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
PLAIN = "api_keys."
"""Before the place of a key that has no name."""
MAX_FILE_NBYTES = 8 << 20
_DIGEST = re.compile(r"[0-9a-f]{64}")

Limit = Annotated[int, Meta(ge=0, le=1 << 53)]
"""0: no limit."""


class ApiKey(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one name may. A limit of 0 is none; an empty list allows everything."""

    name: str = ""
    """Empty: the client of a gateway without keys."""
    sha256: tuple[str, ...] = ()
    """Of each key that stands for the name: two while one takes the other's place."""
    requests_per_minute: Limit = 0
    tokens_per_minute: Limit = 0
    """Of prompts and outputs together."""
    concurrent_streams: Limit = 0
    """Answers that are being made at a time; each choice of ``n`` is one."""
    daily_token_budget: Limit = 0
    """Tokens of prompts and outputs from midnight to midnight, UTC."""
    models: tuple[str, ...] = ()
    strategies: tuple[str, ...] = ()
    """Those that the client may ask for; the first one serves what asks for none."""
    priority: Annotated[int, Meta(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] = 0
    """Where requests must wait for each other, higher ones go first."""
    operator: bool = False
    """May read ``/metrics``, which has the use of all keys."""
    lossy: bool = False
    """KV of its requests may come by a codec that loses something, where they do not say ``exact``."""

    def exact(self, asked: bool | None) -> bool | None:
        """As ``Generate.exact``, of a request that asks so for itself."""
        return False if asked is None and self.lossy else asked

    @property
    def owner(self) -> str:
        """Whose is what is kept: a key without a name is known by itself, for its place may be another's one
        day."""
        return f"sha256:{self.sha256[0]}" if self.name.startswith(PLAIN) else self.name


ANONYMOUS = ApiKey(operator=True)
"""Everybody, where no key is asked for."""


class _File(msgspec.Struct, forbid_unknown_fields=True):
    keys: dict[str, dict[str, Any]] = {}


def make_key() -> str:
    """A new key of 256 random bits."""
    return PREFIX + secrets.token_urlsafe(32)


def digest_of(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def fault_of_name(name: str) -> str:
    """Why a key cannot be called so; empty if it can."""
    if NAME.fullmatch(name) is None:
        return "a name has 1 to 64 letters, digits, dots, dashes and underscores, no sign at the front"
    return f"names with {PLAIN!r} are those of gateway.api_keys" if name.startswith(PLAIN) else ""


def parse_keys(text: str, source: str) -> list[ApiKey]:
    """The keys of a file. Raises :class:`ConfigError` that names the key and the field."""
    try:
        tables = msgspec.convert(tomllib.loads(text), _File).keys
    except (tomllib.TOMLDecodeError, msgspec.ValidationError, RecursionError) as error:
        raise ConfigError(f"{source}: {error}", field="gateway.api_keys_file") from None
    keys = [_parse(name, table, source) for name, table in tables.items()]
    owners: dict[str, str] = {}
    for key in keys:
        for digest in key.sha256:
            if digest in owners:
                raise _wrong(source, key.name, f"has the same key as {owners[digest]!r}")
            owners[digest] = key.name
    return keys


def plain_keys(api_keys: list[str]) -> list[ApiKey]:
    """Those of ``gateway.api_keys``: the operator's own, without limits, named by their places.

    Raises :class:`ConfigError` for one that no client could send."""
    for place, key in enumerate(api_keys):
        if not key.strip():
            raise ConfigError(f"gateway.api_keys: key {place} is empty", field="gateway.api_keys")
    return [
        ApiKey(name=f"{PLAIN}{place}", sha256=(digest_of(key.strip()),), operator=True)
        for place, key in enumerate(dict.fromkeys(api_keys))
    ]


def entry_of(key: ApiKey) -> str:
    """The lines of a file that :func:`parse_keys` reads as ``key``."""
    lines = [f'[keys."{key.name}"]']
    for field in msgspec.structs.fields(key):
        value = getattr(key, field.name)
        if field.name != "name" and value != field.default:
            lines.append(f"{field.name} = {_toml(value)}")
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, str):
        return f'"{"".join(map(_toml_sign, value))}"'
    return json.dumps(value)  # numbers and booleans are alike in both


def _toml_sign(sign: str) -> str:
    return sign if sign.isalnum() or sign in " -_./:" else f"\\U{ord(sign):08X}"


def _parse(name: str, table: dict[str, Any], source: str) -> ApiKey:
    if fault := fault_of_name(name):
        raise _wrong(source, name[:64], fault)
    given = table.get("sha256")
    if isinstance(given, str):
        table = {**table, "sha256": [given]}
    if "name" in table:
        raise _wrong(source, name, "name is the table's own")
    fields = {field.name: field.type for field in msgspec.structs.fields(ApiKey)}
    for field, value in table.items():
        if field not in fields:
            raise _wrong(source, name, f"{printable(field)}: unknown field{did_you_mean(field, fields)}")
        try:
            msgspec.convert(value, fields[field])
        except msgspec.ValidationError:
            raise _wrong(source, name, wrong_value(field, fields[field], value)) from None
    try:
        key = msgspec.convert({**table, "name": name}, ApiKey)
    except msgspec.ValidationError as error:
        raise _wrong(source, name, str(error)) from None
    if not key.sha256 or not all(_DIGEST.fullmatch(digest) for digest in key.sha256):
        raise _wrong(source, name, "sha256 must be the key's SHA-256 in 64 hexadecimal digits, or several")
    return key


def _wrong(source: str, name: str, what: str) -> ConfigError:
    return ConfigError(f"{source}: keys.{name}: {what}", field=f"keys.{name}")
