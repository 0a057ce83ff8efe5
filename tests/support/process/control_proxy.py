"""Stands between routers and the index, and doubles and reorders the control states on their way."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

from microserve.protocol.bus.codec import INDEX_REPLY
from microserve.protocol.bus.transport import Bus, ClientSocket
from microserve.protocol.errors import ProtocolViolation
from microserve.protocol.messages.strategy.control import ControlState

DOUBLED, LATE = 0.3, 0.3
"""Shares of the states that come twice, and that come later than what follows them."""
MAX_DELAY_S = 0.03


class ControlProxy:
    """Everything else passes as it comes. Close it before its bus."""

    def __init__(self, bus: Bus, index_address: str, seed: int) -> None:
        self.num_doubled = self.num_late = 0
        self._bus = bus
        self._index_address = index_address
        self._rng = random.Random(seed)
        self._loop = asyncio.get_running_loop()
        self._up: dict[bytes, ClientSocket] = {}
        self._is_closed = False
        self._down = bus.server("tcp://127.0.0.1:0", self._from_router)

    @property
    def address(self) -> str:
        return self._down.address

    def close(self) -> None:
        self._is_closed = True
        for client in self._up.values():
            client.close()
        self._down.close()

    def _from_router(self, peer: bytes, frames: list[bytes]) -> None:
        if peer not in self._up:
            self._up[peer] = self._bus.client(
                self._index_address, lambda frames: self._from_index(peer, frames)
            )
        self._up[peer].send(frames)

    def _from_index(self, peer: bytes, frames: list[bytes]) -> None:
        try:
            message, _ = INDEX_REPLY.decode(frames)
        except ProtocolViolation:
            message = None
        if not isinstance(message, ControlState):
            self._send(peer, frames)
            return
        if self._rng.random() < DOUBLED:
            self.num_doubled += 1
            self._loop.call_later(self._rng.uniform(0.0, MAX_DELAY_S), self._send, peer, frames)
        if self._rng.random() < LATE:
            self.num_late += 1
            self._loop.call_later(self._rng.uniform(0.0, MAX_DELAY_S), self._send, peer, frames)
        else:
            self._send(peer, frames)

    def _send(self, peer: bytes, frames: Sequence[bytes]) -> None:
        if not self._is_closed:
            self._down.send(peer, frames)
