"""What an engine may rightly do differently, as its hello says it. The suite asks here, and for no name."""

from __future__ import annotations

from microserve.protocol.messages.engine_info import EngineInfo


def splits(info: EngineInfo, begin: int) -> int:
    """The last position up to ``begin`` at which a send from it may begin."""
    return begin // info.split_tokens * info.split_tokens
