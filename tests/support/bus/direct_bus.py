"""A bus of one process without sockets or a loop: frames go in by call and come out in a list."""

from __future__ import annotations

from collections.abc import Sequence

from microserve.protocol.bus.transport import (
    ClientSocket,
    DisconnectHandler,
    FramesHandler,
    PeerHandler,
    PublisherSocket,
    ServerSocket,
)
from microserve.protocol.security.rights import EVERYBODY, Entrance


class DirectServer:
    address = "direct://server"
    sender_key = ""
    sender_roles = EVERYBODY

    def __init__(self, handler: PeerHandler) -> None:
        self.receive = handler
        self.sent: list[tuple[bytes, list[bytes]]] = []
        self.closed = False
        self.gone: set[bytes] = set()
        """Peers to which nothing can be sent."""

    def send(self, peer: bytes, frames: Sequence[bytes]) -> bool:
        if peer in self.gone:
            return False
        self.sent.append((peer, list(frames)))
        return True

    def close(self) -> None:
        self.closed = True


class DirectClient:
    """Its peer is away: what it sends is kept."""

    def __init__(self, handler: FramesHandler) -> None:
        self.receive = handler
        self.sent: list[list[bytes]] = []
        self.closed = self.lingers = False

    def send(self, frames: Sequence[bytes]) -> bool:
        self.sent.append(list(frames))
        return True

    def close(self, *, lingers: bool = True) -> None:
        self.closed, self.lingers = True, lingers


class DirectBus:
    """Servers and clients, not connected to each other: what a service's door needs."""

    public_key = ""

    def __init__(self) -> None:
        self.servers: list[DirectServer] = []
        self.clients: list[DirectClient] = []

    def server(self, address: str, handler: PeerHandler, entrance: Entrance = Entrance.ANY) -> ServerSocket:
        self.servers.append(DirectServer(handler))
        return self.servers[-1]

    def client(
        self,
        address: str,
        handler: FramesHandler,
        *,
        server_key: str = "",
        on_disconnect: DisconnectHandler | None = None,
    ) -> ClientSocket:
        self.clients.append(DirectClient(handler))
        return self.clients[-1]

    def publisher(self, address: str, entrance: Entrance = Entrance.ANY) -> PublisherSocket:
        raise AssertionError("no publishers here")

    def subscriber(self, address: str, handler: FramesHandler, *, server_key: str = "") -> ClientSocket:
        raise AssertionError("no subscribers here")

    def close(self) -> None:
        pass
