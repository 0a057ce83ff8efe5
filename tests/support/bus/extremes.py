"""A message with each of its numbers at, and beyond, every edge that a number may have on the wire."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import msgspec

from microserve.protocol.bus.codec import Codec

NUMBERS = (
    *(0, -1, 1, (1 << 31) - 1, 1 << 31, 1 << 32, 1 << 53, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, -(1 << 63)),
    *(0.0, 5e-324, 0.5, 1e308, -1e308, math.nan, math.inf, -math.inf),
)


def extremes(codec: Codec[Any], message: Any) -> Iterator[tuple[str, list[bytes]]]:
    """Where it is changed and to what, and the frames: all numbers of the message but its tag, one by one."""
    header, encoded = codec.encode(message)
    fields = msgspec.msgpack.decode(encoded)
    for path in _numbers_in(fields):
        if path == (0,):
            continue
        for number in NUMBERS:
            changed = msgspec.msgpack.decode(encoded)
            _put(changed, path, number)
            yield (
                f"{type(message).__name__}{list(path)} = {number}",
                [header, msgspec.msgpack.encode(changed)],
            )


def _numbers_in(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all numbers; of a map also its keys, marked by None."""
    if isinstance(value, bool):
        return
    if isinstance(value, int | float):
        yield path
    elif isinstance(value, list):
        for index, each in enumerate(value):
            yield from _numbers_in(each, (*path, index))
    elif isinstance(value, dict):
        for key, each in value.items():
            if isinstance(key, int):
                yield (*path, key, None)
            yield from _numbers_in(each, (*path, key))


def _put(value: Any, path: tuple[Any, ...], number: float) -> None:
    *way, last = path
    if last is None:
        *way, last = way
        for step in way:
            value = value[step]
        value[number] = value.pop(last)
        return
    for step in way:
        value = value[step]
    value[last] = number
