"""A bus that swallows the messages that a test names, on connections that stay alive."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from microserve.protocol.bus.transport import (
    Bus,
    ClientSocket,
    DisconnectHandler,
    FramesHandler,
    PeerHandler,
    PublisherSocket,
    ServerSocket,
)
from microserve.protocol.security.rights import Entrance, Roles


class LossyBus:
    """Around a real bus. Messages are counted from 1, each direction for itself, over all its sockets."""

    def __init__(
        self, bus: Bus, *, clients: Callable[[str], bool] = lambda address: True, servers: bool = True
    ) -> None:
        """``clients``: addresses to which messages are lost; ``servers``: their messages are lost as well."""
        self.num_up = self.num_down = 0
        """Messages of clients, and of servers, that were sent or swallowed."""
        self.swallow_up: set[int] = set()
        self.swallow_down: set[int] = set()
        self.num_swallowed = 0
        self._bus = bus
        self._clients = clients
        self._servers = servers

    @property
    def public_key(self) -> str:
        return self._bus.public_key

    def server(self, address: str, handler: PeerHandler, entrance: Entrance = Entrance.ANY) -> ServerSocket:
        server = self._bus.server(address, handler, entrance)
        return _LossyServer(self, server) if self._servers else server

    def client(
        self,
        address: str,
        handler: FramesHandler,
        *,
        server_key: str = "",
        on_disconnect: DisconnectHandler | None = None,
    ) -> ClientSocket:
        client = self._bus.client(address, handler, server_key=server_key, on_disconnect=on_disconnect)
        return _LossyClient(self, client) if self._clients(address) else client

    def publisher(self, address: str, entrance: Entrance = Entrance.ANY) -> PublisherSocket:
        return self._bus.publisher(address, entrance)

    def subscriber(self, address: str, handler: FramesHandler, *, server_key: str = "") -> ClientSocket:
        return self._bus.subscriber(address, handler, server_key=server_key)

    def close(self) -> None:
        self._bus.close()

    def lose_next_up(self) -> None:
        self.swallow_up.add(self.num_up + 1)

    def lose_next_down(self) -> None:
        self.swallow_down.add(self.num_down + 1)

    def loses_up(self) -> bool:
        self.num_up += 1
        return self._count(self.num_up in self.swallow_up)

    def loses_down(self) -> bool:
        self.num_down += 1
        return self._count(self.num_down in self.swallow_down)

    def _count(self, is_lost: bool) -> bool:
        self.num_swallowed += is_lost
        return is_lost


class _LossyServer:
    def __init__(self, bus: LossyBus, socket: ServerSocket) -> None:
        self._bus = bus
        self._socket = socket

    @property
    def address(self) -> str:
        return self._socket.address

    @property
    def sender_key(self) -> str:
        return self._socket.sender_key

    @property
    def sender_roles(self) -> Roles:
        return self._socket.sender_roles

    def send(self, peer: bytes, frames: Sequence[bytes]) -> bool:
        return self._bus.loses_down() or self._socket.send(peer, frames)

    def close(self) -> None:
        self._socket.close()


class _LossyClient:
    def __init__(self, bus: LossyBus, socket: ClientSocket) -> None:
        self._bus = bus
        self._socket = socket

    def send(self, frames: Sequence[bytes]) -> bool:
        return self._bus.loses_up() or self._socket.send(frames)

    def close(self, *, lingers: bool = True) -> None:
        self._socket.close(lingers=lingers)
