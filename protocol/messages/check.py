"""The self-check: what a router has found of two engines, and who exchanges no KV by it (WIRE.md 6.8).

Plain data. Who checks whom, and how, is services/router/check's; who is told is services/index/checks.py's.
"""

from __future__ import annotations

from typing import Final

import msgspec

EQUAL: Final = "equal"
DIFFERS: Final = "differs"
UNFINISHED: Final = "unfinished"
OUTCOMES: Final = (EQUAL, DIFFERS, UNFINISHED)

CACHED: Final = "cached"
TRANSFERRED: Final = "transferred"

BITS: Final = "bits"
TOKENS: Final = "tokens"

MAX_TOLD = 32
"""Checks in one ``Watch``: the newest, and of all before them those that found a difference."""
MAX_REPORTED = 256
"""Checks in one ``IndexReport``."""


class PairCheck(msgspec.Struct, frozen=True, array_like=True):
    """One check that is over. Of a pair the last one counts, whichever router made it."""

    source: str
    """Engine that was asked cold, then with its own cache, and whose KV went to ``target``."""
    target: str
    """Empty: the source alone was checked."""
    outcome: str
    """``equal``, ``differs`` or ``unfinished``: an engine failed, left or had no room, which says nothing."""
    differs: str = ""
    """Which answer is not as the cold one: ``cached``, so that ``source`` alone is to blame, or
    ``transferred``."""
    compared: str = ""
    """``bits``: tokens and log-probabilities, bit for bit; ``tokens``: of a class that is not exact."""
    code: str = ""
    """Error code, if it is unfinished."""
    number: int = 0
    """Of the router that made it: its checks have different ones."""
    took_s: float = 0.0
    num_tokens: int = 0
    """Computed for it by both engines, prompts and output."""
    age_s: float = 0.0
    """Since it was over."""
    router_id: str = ""
    """Who made it; the index fills it in."""

    @property
    def pair(self) -> tuple[str, str]:
        return self.source, self.target


class Suspect(msgspec.Struct, frozen=True, array_like=True):
    """No KV goes from one to the other, until a later check finds them equal."""

    source: str
    target: str = ""
    """Empty: any, and from any: the engine does not agree with itself."""
