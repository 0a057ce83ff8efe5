"""The numerics class: which computations make the same bits of the same row (WIRE.md 4.5).

Plain data and the one rule of adding up. Does not know what makes a class (services/engine/model/numerics.py)
nor who prefers one (services/router/authoring/mesh.py).
"""

from __future__ import annotations

import re

import msgspec

MAX_NUMERICS_CHARS = 64
"""Longest name of a class."""
MIXED = "mixed"
"""Name of what several classes have made; no engine's own."""
NONE = "none"
"""What a client is told where nothing is promised; no engine's own."""

_NAME = re.compile(rf"[A-Za-z0-9._+-]{{1,{MAX_NUMERICS_CHARS}}}")


class Numerics(msgspec.Struct, frozen=True, array_like=True):
    """In which class something was, or is, computed."""

    name: str = ""
    """Opaque: recipe of the kernel, dtype, digest of weights and tables. Equal names: one class, on whatever
    machines. ``mixed``: of several. Empty: not said."""
    is_exact: bool = False
    """Within the class a row's bits depend on that row and its own context alone."""

    @property
    def promise(self) -> str:
        """For a client: the class in which all of it was made bit for bit as it always is, or ``none``."""
        return self.name if self.is_exact and self.name else NONE

    def joined(self, other: Numerics) -> Numerics:
        """Of what was made partly in the one, partly in the other."""
        if self == other:
            return self
        if self.name == other.name:  # they disagree about it, so one of them is wrong
            return Numerics(self.name)
        return Numerics(MIXED)


UNKNOWN = Numerics()


def fault_of_numerics(numerics: Numerics) -> str:
    """Why an engine cannot be of this class; empty if it can."""
    name = numerics.name
    if not name:
        return "a class without a name cannot be exact" if numerics.is_exact else ""
    if _NAME.fullmatch(name) is None:
        return f"a class has 1 to {MAX_NUMERICS_CHARS} of A-Z a-z 0-9 . _ + -; got {name[:80]!r}"
    return f"{name!r} is no name of a class" if name in (MIXED, NONE) else ""
