"""Messages of the wire, which are arrays, as JSON with names."""

from __future__ import annotations

from typing import Any

import msgspec

from microserve.protocol.messages.strategy.control import StrategyVersion

LEFT_OUT: dict[type[msgspec.Struct], frozenset[str]] = {StrategyVersion: frozenset({"source"})}
"""An author's source is nobody's business who only looks."""
_NONE: frozenset[str] = frozenset()


def named(value: Any) -> Any:
    """Structures become maps by field, all the way down."""
    if isinstance(value, msgspec.Struct):
        hidden = LEFT_OUT.get(type(value), _NONE)
        return {name: named(getattr(value, name)) for name in value.__struct_fields__ if name not in hidden}
    if isinstance(value, dict):
        return {str(key): named(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [named(each) for each in value]
    return value
