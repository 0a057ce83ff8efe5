"""Settings as the TOML that would give them, for people to read; secrets are masked."""

from __future__ import annotations

import json
import re
from typing import Any

import msgspec

from microserve.protocol.settings.settings import SECRET_FIELDS, Settings

MASK = "********"

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def as_toml(settings: Settings) -> str:
    """Every section with every field, defaults included."""
    lines: list[str] = []
    for section, fields in msgspec.to_builtins(settings).items():
        lines.append(f"[{section}]")
        for name, value in fields.items():
            secret = f"{section}.{name}" in SECRET_FIELDS
            lines.append(f"{name} = {_value(_masked(value) if secret else value)}")
        lines.append("")
    return "\n".join(lines)


def _masked(value: Any) -> Any:
    """Of a text that is empty it is seen that it is."""
    return [MASK for _ in value] if isinstance(value, list) else value and MASK


def _value(value: Any) -> str:
    if isinstance(value, dict):
        pairs = ", ".join(f"{_key(name)} = {_value(inner)}" for name, inner in value.items())
        return f"{{ {pairs} }}" if pairs else "{}"
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    return json.dumps(value, ensure_ascii=False)  # strings, numbers and booleans are alike in TOML


def _key(name: str) -> str:
    return name if _BARE_KEY.fullmatch(name) else json.dumps(name, ensure_ascii=False)
