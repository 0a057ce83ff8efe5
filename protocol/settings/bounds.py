"""What settings are made of: sections, and numbers whose types say their bounds (``Annotated[float,
Meta(gt=0)]``): kept or not, and in words.

Knows no setting by name.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, get_args

import msgspec
from msgspec import Meta

from microserve.protocol.errors import ConfigError

Count = Annotated[int, Meta(gt=0)]
CountOrZero = Annotated[int, Meta(ge=0)]
Port = Annotated[int, Meta(ge=0, le=65535)]
Positive = Annotated[float, Meta(gt=0)]
PositiveOrZero = Annotated[float, Meta(ge=0)]
"""Bounds are said at the field, here and by ``Meta``. Floats are finite."""


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


def fault_of_number(path: str, kind: Any, value: Any) -> ConfigError | None:
    """What is wrong with ``value`` by the bounds of its field's type; None also for what is no number."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    if isinstance(value, int) and value.bit_length() > 63:  # no message and no clock holds it
        return ConfigError(f"{path} must be within 64 bits, has {value.bit_length()}", field=path)
    if not math.isfinite(value):
        return ConfigError(f"{path} must be a finite number, is {value}", field=path)
    for bound in (each for each in get_args(kind) if isinstance(each, Meta)):
        low, high = _whole(bound.ge if bound.gt is None else bound.gt), _whole(bound.le)
        too_low = low is not None and (value < low or (value == low and bound.gt is not None))
        if not too_low and (high is None or value <= high):
            continue
        if bound.gt is not None:
            text = f"above {low}" if high is None or too_low else f"at most {high}"
        else:
            text = f"{low} or more" if high is None else f"{low} to {high}"
        return ConfigError(f"{path} must be {text}, is {value}", field=path)
    return None


def bound_in_words(bound: object) -> str:
    """``above 0``, ``of 0 or more``, ``from 0 to 65535``; empty for what bounds no number."""
    if not isinstance(bound, Meta):
        return ""
    low, high = _whole(bound.ge), _whole(bound.le)
    if bound.gt is not None:
        return f"above {_whole(bound.gt)}" + (f" and at most {high}" if high is not None else "")
    if low is None:
        return "" if high is None else f"up to {high}"
    return f"of {low} or more" if high is None else f"from {low} to {high}"


def _whole(bound: float | None) -> float | None:
    """1.0 as 1: ``Meta(le=1)`` equals ``Meta(le=1.0)``, so which of the two a type holds is for ``typing``'s
    cache to say, by what was imported before."""
    return int(bound) if bound is not None and bound == int(bound) else bound
