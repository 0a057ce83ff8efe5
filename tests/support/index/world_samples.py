"""Samples and frozen bytes of the messages about NVSHMEM worlds; part of wire_samples.py."""

from __future__ import annotations

from typing import Any

from microserve.protocol.bus.codec import INDEX_REPLY, INDEX_REQUEST, Codec
from microserve.protocol.messages.world import JoinWorld, WorldJoined, WorldRank, WorldWaiting

RANKS = [
    WorldRank(incarnation=1 << 60, host="boot pid:[1]", process=(1 << 63) + 5),
    WorldRank(incarnation=9, host="other pid:[1]", process=6),
]

MESSAGES: list[tuple[Codec[Any], Any]] = [
    (
        INDEX_REQUEST,
        JoinWorld(
            call_id=1,
            world="w",
            rank=2,
            num_ranks=3,
            who=RANKS[0],
            unique_id=bytes(range(4)),
            memory_nbytes=5,
        ),
    ),
    (INDEX_REPLY, WorldJoined(call_id=1, unique_id=bytes(range(4)), ranks=RANKS)),
    (INDEX_REPLY, WorldWaiting(world="w", present=[0, 2])),
]

GOLDEN: dict[str, str] = {
    "TO_INDEX.JoinWorld": (
        "980a01a177020393cf1000000000000000ac626f6f74207069643a5b315dcf8000000000000005c4040001020305"
    ),
    "FROM_INDEX.WorldJoined": (
        "940b01c404000102039293cf1000000000000000ac626f6f74207069643a5b315dcf80000000000000059309ad6f7468"
        "6572207069643a5b315d06"
    ),
    "FROM_INDEX.WorldWaiting": "930ca177920002",
}
