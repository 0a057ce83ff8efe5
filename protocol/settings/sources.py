"""Where settings come from: a TOML file, then ``MICROSERVE_SECTION__FIELD``, then ``section.field=value``.

Read once, in the command line; nothing else reads the environment for settings. Owns the order of sources and
which of the environment's names are meant for us; what is said of a wrong one is faults.py's.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from microserve.protocol.errors import ConfigError, located
from microserve.protocol.settings.faults import fault_of_value, printable, unknown_setting
from microserve.protocol.settings.settings import Settings

ENV_PREFIX = "MICROSERVE_"
CONFIG_VARIABLE = f"{ENV_PREFIX}CONFIG"
"""The settings' file where no ``--config`` names one."""
MAX_FILE_NBYTES = 1 << 22

_OTHERS = frozenset({CONFIG_VARIABLE, f"{ENV_PREFIX}KERNEL_CACHE", f"{ENV_PREFIX}PACKED_CACHE"})
"""Variables of ours that are no settings; ``MICROSERVE_TEST_*`` are the tests'."""
_SUPERVISORD = frozenset(f"{ENV_PREFIX}{name}" for name in ("BIN", "LOGS", "ENGINES"))
"""Read by deploy/supervisord.conf, together: ``MICROSERVE_ENGINES`` alone is meant for us, and wrong."""
_KUBERNETES = "_SERVICE_HOST"
"""A service ``microserve-gateway`` of Kubernetes puts MICROSERVE_GATEWAY_SERVICE_HOST, .._SERVICE_PORT,
.._PORT and .._PORT_8000_TCP into every container beside it."""
_TOML_LINE = re.compile(r"\(at line (\d+), column \d+\)")


def load_settings(
    file: str | Path | None = None,
    *,
    environment: Mapping[str, str] | None = None,
    overrides: Iterable[str] = (),
    fallbacks: Mapping[str, Any] | None = None,
) -> Settings:
    """Merge the sources; later ones win. ``overrides`` are ``section.field=value``; ``fallbacks`` are values
    by ``section.field``, for what no source names.

    Raises :class:`ConfigError` whose ``field`` is the dotted path of the first wrong setting, and whose
    detail says what would be right, and where the wrong one came from unless that is a flag.
    """
    merged: dict[str, Any] = {}
    origins: dict[str, str] = {}
    if file is not None:
        merged = _read(file)
        origins.update(dict.fromkeys(_paths(merged), str(file)))
    for name, raw in sorted(_ours(environment or {}).items()):
        path = name[len(ENV_PREFIX) :].lower().split("__")
        if (other := origins.get(".".join(path), "")).upper() == name.upper():
            raise ConfigError(f"{'.'.join(path)} is given twice, as {other} and {name}", field=".".join(path))
        _assign(merged, path, raw, source=name)
        origins[".".join(path)] = name
    for override in overrides:
        path_text, equals, raw = override.partition("=")
        path = path_text.strip().split(".")
        if not equals or "" in path:
            raise ConfigError(f"{printable(override)} is not section.field=value", field=path_text)
        _assign(merged, path, raw.strip(), source=override)
        origins[".".join(path)] = ""
    for name, value in (fallbacks or {}).items():
        section, _, field = name.partition(".")
        if isinstance(given := merged.setdefault(section, {}), dict):
            given.setdefault(field, value)
    _check(merged, origins)
    try:
        return msgspec.convert(merged, Settings, strict=False).check()
    except msgspec.ValidationError as error:
        place, message = located(error)
        raise ConfigError(f"{place}: {message}" if place else message, field=place or None) from None


# --- a file ------------------------------------------------------------------------------------------


def _read(file: str | Path) -> dict[str, Any]:
    shown = printable(str(file), max_chars=4096)  # the longest path that there is
    try:
        with open(file, "rb") as source:
            content = source.read(MAX_FILE_NBYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"cannot read {shown}: {reason}", field=shown) from None
    if len(content) > MAX_FILE_NBYTES:
        raise ConfigError(f"{shown}: more than {MAX_FILE_NBYTES >> 20} MB are no settings", field=shown)
    try:
        text = content.decode()
        return tomllib.loads(text)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{shown}: line {line} is not UTF-8", field=shown) from None
    except tomllib.TOMLDecodeError as error:
        path, detail = _place(text, str(error))
        raise ConfigError(f"{shown}: {detail}", field=path or shown) from None
    except RecursionError:
        raise ConfigError(f"{shown}: nested too deep", field=shown) from None
    except ValueError as error:  # a number of thousands of digits
        raise ConfigError(f"{shown}: {error}", field=shown) from None


def _place(text: str, message: str) -> tuple[str, str]:
    """The setting at which a file ceases to be TOML (empty: none can be told), and words that name it.

    The line itself is not shown: it may hold a key.
    """
    found = _TOML_LINE.search(message)
    lines = text.splitlines()[: int(found[1])] if found else []
    if not found or not lines:
        return "", message
    name = lines[-1].partition("=")[0].strip()
    heads = [re.match(r"\s*\[+([^\[\]]+)\]", line) for line in lines]
    section = next((head[1].strip() for head in reversed(heads) if head), "")
    path = ".".join(filter(None, (section, name if re.fullmatch(r"[\w.-]+", name) else "")))
    what = message.replace(found[0], "").strip()
    if what.startswith("Cannot overwrite"):
        what = "given twice"
    elif what.startswith("Cannot declare"):
        what = "a section stands twice"
    elif what.startswith("Invalid value"):
        what = 'no value of TOML; text stands in quotes ("...")'
    return path, f"line {found[1]}: {f'{path}: ' if path else ''}{what}"


def _paths(given: Mapping[str, Any]) -> Iterable[str]:
    for section, fields in given.items():
        yield section
        if isinstance(fields, dict):
            yield from (f"{section}.{name}" for name in fields)


# --- the environment ---------------------------------------------------------------------------------


def _ours(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables that are settings. Raises :class:`ConfigError` for one that is only meant to be."""
    services = tuple(name.removesuffix(_KUBERNETES) for name in environment if name.endswith(_KUBERNETES))
    found = {}
    for name in sorted(environment):
        if not name.upper().startswith(ENV_PREFIX) or _is_somebody_else_s(name, environment, services):
            continue
        rest = name[len(ENV_PREFIX) :]
        if not name.startswith(ENV_PREFIX) or "__" not in rest:
            advice = unknown_setting(rest.lower().replace("__", "."), spell=variable)
            raise ConfigError(f"{printable(name)} is no setting{advice}", field=printable(name))
        found[name] = environment[name]
    return found


def variable(path: str) -> str:
    """The variable for the setting at ``path``."""
    return ENV_PREFIX + path.upper().replace(".", "__")


def _is_somebody_else_s(name: str, environment: Mapping[str, str], services: tuple[str, ...]) -> bool:
    if name in _OTHERS or name.startswith(f"{ENV_PREFIX}TEST_"):
        return True
    if name in _SUPERVISORD:
        return environment.keys() >= _SUPERVISORD
    return any(re.match(rf"{re.escape(each)}_(SERVICE_|PORT(_|$))", name) for each in services)


# --- values ------------------------------------------------------------------------------------------


def _check(merged: Mapping[str, Any], origins: Mapping[str, str]) -> None:
    """Names and values one by one, in our words: msgspec's name neither the value nor its bound."""
    sections = {section.name: section.type for section in msgspec.structs.fields(Settings)}
    for section, given in merged.items():
        if section not in sections:
            named = [f"{section}.{name}" for name in given] if isinstance(given, dict) else []
            _refuse_name(named[0] if named else section, origins, field=section)
        if not isinstance(given, dict):
            detail = f"{section} must be a section ([{section}] with fields), is {printable(given)}"
            raise ConfigError(detail + _from(origins, section), field=section)
        kinds = {field.name: field.type for field in msgspec.structs.fields(sections[section])}
        for name, value in given.items():
            path = f"{section}.{name}"
            if name not in kinds:
                _refuse_name(path, origins, field=path)
            if fault := fault_of_value(path, kinds[name], value):
                raise ConfigError(fault.detail + _from(origins, path), field=fault.field)


def _refuse_name(path: str, origins: Mapping[str, str], *, field: str) -> None:
    origin = origins.get(path, "")
    advice = unknown_setting(path, spell=variable if origin.startswith(ENV_PREFIX) else str)
    raise ConfigError(
        f"{printable(path)}: unknown field{advice}{_from(origins, path)}", field=printable(field)
    )


def _from(origins: Mapping[str, str], path: str) -> str:
    """Where a value came from, in brackets. A flag is before its user's eyes."""
    below = next((origin for name, origin in origins.items() if name.startswith(f"{path}.")), "")
    origin = origins.get(path, below)
    return f" ({printable(origin, max_chars=4096)})" if origin else ""


def _assign(merged: dict[str, Any], path: list[str], raw: str, *, source: str) -> None:
    node = merged
    for name in path[:-1]:
        child = node.setdefault(name, {})
        if not isinstance(child, dict):
            raise ConfigError(f"{printable(source)}: {name} is not a section", field=".".join(path))
        node = child
    value = _value(raw)
    node[path[-1]] = raw if _is_text(path) and not isinstance(value, str) else value


def _is_text(path: list[str]) -> bool:
    """Whether the setting is a string, so that ``engine.id=7`` is not taken for a number."""
    section: Any = Settings
    for name in path:
        if not (isinstance(section, type) and issubclass(section, msgspec.Struct)):
            return False
        section = next((field.type for field in msgspec.structs.fields(section) if field.name == name), None)
    return getattr(section, "__origin__", section) is str


def _value(raw: str) -> Any:
    """A TOML value if it reads as one (``3``, ``true``, ``["a"]``), else the text itself."""
    try:
        return tomllib.loads(f"value = {raw}")["value"]
    except (ValueError, RecursionError):  # no TOML, a number of thousands of digits, thousands of brackets
        return raw
