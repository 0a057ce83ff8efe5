"""What an engine may rightly do differently, as its hello says it. The suite asks here, and for no name."""

from __future__ import annotations

from microserve.protocol.messages.engine_info import EngineInfo


def splits(info: EngineInfo, begin: int) -> int:
    """The last position up to ``begin`` at which a send from it may begin."""
    return begin // info.split_tokens * info.split_tokens


def matches(info: EngineInfo, cached: int, end: int) -> set[int]:
    """What a grant up to ``end`` may say that it has matched, of a prefix of ``cached`` tokens: whole blocks,
    and one less where an engine that computes received tokens again needs the last of them."""
    most = min(cached, end) // info.block_size * info.block_size
    needs_last = info.recompute_tokens > 0 and 0 < most == end
    return {most, most - info.block_size} if needs_last else {most}
