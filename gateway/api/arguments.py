"""A call's arguments, which are JSON within a text: what bounds a body must bound them, too.

Owns how deep and how many they may be, whoever sends them back. Whatever is made of a conversation goes
through its values one within another.
"""

from __future__ import annotations

from typing import Any

import msgspec

from microserve.gateway.api.parse import Shape, check_shape
from microserve.protocol.errors import InvalidRequest

SHAPE = Shape()
"""Of one text."""


def arguments_of(text: str, field: str) -> dict[str, Any]:
    """No text is no arguments. Raises :class:`InvalidRequest` naming ``field``."""
    data = text.encode() or b"{}"
    try:
        check_shape(data, SHAPE)
    except InvalidRequest:
        raise InvalidRequest(
            f"{field} may be nested {SHAPE.max_depth} deep at most, and have {SHAPE.max_values} values",
            field=field,
        ) from None
    try:
        arguments = msgspec.json.decode(data)
    except (msgspec.MsgspecError, UnicodeError):
        arguments = None
    if not isinstance(arguments, dict):
        raise InvalidRequest(f"{field} must be the JSON of an object", field=field)
    return arguments
