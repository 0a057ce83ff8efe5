"""What an engine may rightly do differently, as its hello says it. The suite asks here, and for no name."""

from __future__ import annotations

from microserve.protocol.messages.engine import EngineInfo


def does(info: EngineInfo, ability: str) -> bool:
    """Has it this ability, by name? An engine that says nothing has all of them."""
    can = getattr(info, "can", None)
    return can is None or ability in can


def split_tokens(info: EngineInfo) -> int:
    """A send from it begins at a multiple of so many tokens."""
    return int(getattr(info, "split_tokens", 1))


def recompute_tokens(info: EngineInfo) -> int:
    """At most so many of the last tokens of a received prefix are computed again by it."""
    return int(getattr(info, "recompute_tokens", 0))


def splits(info: EngineInfo, begin: int) -> int:
    """The last position up to ``begin`` at which a send from it may begin."""
    return begin // split_tokens(info) * split_tokens(info)
