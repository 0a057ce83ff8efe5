"""Bounds of half-open intervals of a prompt, as actions name them (WIRE.md): negative counts from the end."""

from __future__ import annotations

from microserve.protocol.errors import InvalidInterval


def bound(field: str, value: int, num_tokens: int) -> int:
    """A position in ``[0, num_tokens]``. Raises :class:`InvalidInterval` that names the field."""
    position = num_tokens + value if value < 0 else value
    if not 0 <= position <= num_tokens:
        raise InvalidInterval(f"{field} {value} is outside a prompt of {num_tokens} tokens", field=field)
    return position
