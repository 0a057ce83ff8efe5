"""The index's desk for worlds without its sockets: who asks, what is sent to whom, and who is gone."""

from __future__ import annotations

from typing import Any

import msgspec

from microserve.protocol.messages import index as wire
from microserve.protocol.messages.world import JoinWorld, WorldJoined, WorldRank, WorldWaiting
from microserve.services.index.worlds import WorldDesk

SILENCE_S = 1.5
NEVER_LATE_S = 1000.0
"""The interval: no look here is late, so time counts as it is."""


class Bench:
    """A desk and the peers in front of it, one for each life."""

    def __init__(self, *, has_keys: bool = True) -> None:
        self.desk = WorldDesk(self.send, has_keys=has_keys, interval_s=NEVER_LATE_S, silence_s=SILENCE_S)
        self.gone: set[bytes] = set()
        self.sent: list[tuple[bytes, wire.IndexReply]] = []
        self.now = 100.0

    def send(self, peer: bytes, reply: wire.IndexReply) -> bool:
        if peer not in self.gone:
            self.sent.append((peer, reply))
        return peer not in self.gone

    def ask(self, rank: int, life: int, num_ranks: int = 2, **changes: Any) -> None:
        peer = changes.pop("peer", str(life).encode())
        message = join(rank, life, num_ranks)
        self.desk.join(peer, msgspec.structs.replace(message, **changes), self.now)

    def joined(self) -> dict[bytes, WorldJoined]:
        return {peer: reply for peer, reply in self.sent if isinstance(reply, WorldJoined)}

    def present(self, life: int) -> list[int]:
        """As that life was told last."""
        peer = str(life).encode()
        return [reply.present for to, reply in self.sent if to == peer and isinstance(reply, WorldWaiting)][
            -1
        ]


def unique_id(life: int) -> bytes:
    return b"secret %8d" % life


def join(rank: int, life: int, num_ranks: int = 2, world: str = "w") -> JoinWorld:
    who = WorldRank(life, "host", life << 42)
    return JoinWorld(life + 1000, world, rank, num_ranks, who, b"" if rank else unique_id(life))
