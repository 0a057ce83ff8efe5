"""A numbered server and its client on a bus that hands over what the test wants, by call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from microserve.protocol.bus.numbered import NumberedClient, NumberedServer, Outgoing
from microserve.protocol.bus.transport import (
    ClientSocket,
    DisconnectHandler,
    FramesHandler,
    PeerHandler,
    PublisherSocket,
    ServerSocket,
)
from microserve.protocol.security.rights import EVERYBODY, Entrance

ANY = "tcp://127.0.0.1:0"
HEADER = b"\x01\x02"


class WireServer:
    address = "wire://server"
    sender_key = ""
    sender_roles = EVERYBODY

    def __init__(self, bus: WireBus) -> None:
        self._bus = bus

    def send(self, peer: bytes, frames: Sequence[bytes]) -> bool:
        self._bus.to_client.append((peer, list(frames)))
        return not self._bus.refuse

    def close(self) -> None:
        pass


class WireClient:
    def __init__(self, bus: WireBus) -> None:
        self._bus = bus

    def send(self, frames: Sequence[bytes]) -> bool:
        self._bus.to_server.append(list(frames))
        return not self._bus.refuse

    def close(self, *, lingers: bool = True) -> None:
        pass


@dataclass
class WireBus:
    """Keeps what is sent, for the test to deliver or not."""

    public_key: str = ""
    refuse: bool = False
    to_client: list[tuple[bytes, list[bytes]]] = field(default_factory=list)
    to_server: list[list[bytes]] = field(default_factory=list)
    client_handler: FramesHandler | None = None
    server_handler: PeerHandler | None = None

    def server(self, address: str, handler: PeerHandler, entrance: Entrance = Entrance.ANY) -> ServerSocket:
        self.server_handler = handler
        return WireServer(self)

    def client(
        self,
        address: str,
        handler: FramesHandler,
        *,
        server_key: str = "",
        on_disconnect: DisconnectHandler | None = None,
    ) -> ClientSocket:
        self.client_handler = handler
        return WireClient(self)

    def publisher(self, address: str, entrance: Entrance = Entrance.ANY) -> PublisherSocket:
        raise NotImplementedError

    def subscriber(self, address: str, handler: FramesHandler, *, server_key: str = "") -> ClientSocket:
        raise NotImplementedError

    def close(self) -> None:
        pass


class Pair:
    """One server and the client ``peer``; events in the order in which they were told."""

    def __init__(self, peer: bytes = b"p") -> None:
        self.bus = WireBus()
        self.peer = peer
        self.at_server: list[object] = []
        self.at_client: list[object] = []
        self.server = NumberedServer(
            self.bus,
            ANY,
            lambda peer, frames: self.at_server.append(frames[1]),
            lambda peer: self.at_server.append("loss"),
        )
        self.client = self.new_client()

    def new_client(self) -> NumberedClient:
        return NumberedClient(
            self.bus, ANY, lambda frames: self.at_client.append(frames[1]), self.at_client.append
        )

    def up(self, text: bytes, *, lost: bool = False) -> None:
        self.client.send([HEADER, text])
        assert self.bus.server_handler is not None
        frames = self.bus.to_server.pop()
        if not lost:
            self.bus.server_handler(self.peer, frames)

    def stranger(self, peer: bytes) -> None:
        """Another client's first message."""
        assert self.bus.server_handler is not None
        self.bus.server_handler(peer, [Outgoing(9).stamp(HEADER), b"hi"])

    def down(self, text: bytes, *, lost: bool = False) -> None:
        self.server.send(self.peer, [HEADER, text])
        assert self.bus.client_handler is not None
        _, frames = self.bus.to_client.pop()
        if not lost:
            self.bus.client_handler(frames)
