"""ZeroMQ sockets inside an asyncio loop: plain sockets, their FD watched, drained with NOBLOCK.

Owns what a bus is and what can be asked of its sockets; how they work is ``sockets.py``'s, who may use them
``security/``'s. Knows frames, not messages. ``zmq.asyncio`` is not used: a cancelled ``recv`` can lose a
message there, and it costs two thirds of the throughput.

High-water marks: ROUTER sockets refuse at theirs (ROUTER_MANDATORY: the refusal is an error, counted here),
so whatever must not be lost goes by credit (credit.py) and stays far below it. What a reconnect loses in
silence is found by the numbers of numbered.py.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Protocol, TypeVar

import structlog
import zmq

from microserve.protocol import log
from microserve.protocol.bus.curve import CurveKeys
from microserve.protocol.bus.sockets import (
    GIVE_UP_S,
    Client,
    DisconnectHandler,
    FramesHandler,
    PeerHandler,
    Publisher,
    Server,
    Subscriber,
    Wiring,
)
from microserve.protocol.security.rights import Entrance, Roles

__all__ = [
    "Bus",
    "ClientSocket",
    "DisconnectHandler",
    "FramesHandler",
    "PeerHandler",
    "PublisherSocket",
    "ServerSocket",
    "ZmqBus",
]

CLOSE_S = 2.0
"""Beyond the linger: that long ``ZmqBus.close`` waits for libzmq to end its connections."""

_logger = structlog.get_logger()


class ServerSocket(Protocol):
    """Many peers, each answered by its routing id."""

    @property
    def address(self) -> str: ...
    @property
    def sender_key(self) -> str:
        """Public key (Z85) of who sent the message that is being handled; empty when it cannot be known."""
        ...

    @property
    def sender_roles(self) -> Roles:
        """What that key stands for; without keys everybody may do everything."""
        ...

    def send(self, peer: bytes, frames: Sequence[bytes]) -> bool: ...
    def close(self) -> None: ...


class ClientSocket(Protocol):
    """One peer."""

    def send(self, frames: Sequence[bytes]) -> bool: ...
    def close(self, *, lingers: bool = True) -> None:
        """Not to linger is to drop what is not sent: one that lingers still connects to whoever comes."""
        ...


class PublisherSocket(Protocol):
    @property
    def address(self) -> str: ...
    def send(self, frames: Sequence[bytes]) -> bool: ...
    def close(self) -> None: ...


class Bus(Protocol):
    """Where sockets come from; a simulation brings its own."""

    @property
    def public_key(self) -> str:
        """Z85 public key that peers need to connect to our sockets; empty without CURVE."""
        ...

    def server(
        self, address: str, handler: PeerHandler, entrance: Entrance = Entrance.ANY
    ) -> ServerSocket: ...
    def client(
        self,
        address: str,
        handler: FramesHandler,
        *,
        server_key: str = "",
        on_disconnect: DisconnectHandler | None = None,
    ) -> ClientSocket: ...
    def publisher(self, address: str, entrance: Entrance = Entrance.ANY) -> PublisherSocket: ...
    def subscriber(self, address: str, handler: FramesHandler, *, server_key: str = "") -> ClientSocket: ...
    def close(self) -> None: ...


MAX_SOCKETS = 16_384
"""Of a process: an engine takes up to four of them in a router, and there may be ``MAX_MEMBERS`` engines."""

S = TypeVar("S", Server, Client, Publisher, Subscriber)


class ZmqBus(Wiring):
    """The sockets of one process. Make it inside the running loop; ``close`` ends them all."""

    def __init__(
        self,
        *,
        high_water_mark: int = 10_000,
        linger_s: float = 1.0,
        give_up_s: float = GIVE_UP_S,
        keys: CurveKeys | None = None,
        insecure: bool = False,
    ) -> None:
        """``insecure``: bind without keys where other machines reach us, too. ``give_up_s``: a connection on
        which the other kernel acknowledges nothing for so long is closed. Raises :class:`ConfigError`."""
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        context.set(zmq.MAX_SOCKETS, min(MAX_SOCKETS, int(context.get(zmq.SOCKET_LIMIT))))
        super().__init__(
            context,
            high_water_mark=high_water_mark,
            linger_s=linger_s,
            give_up_s=give_up_s,
            keys=keys,
            insecure=insecure,
        )

    @property
    def public_key(self) -> str:
        return self.keys.public.decode() if self.keys is not None else ""

    @property
    def refused_keys(self) -> dict[str, float]:
        """Public keys that our sockets have turned away, and the seconds since it was last."""
        return self.guard.refused_keys()

    def server(self, address: str, handler: PeerHandler, entrance: Entrance = Entrance.ANY) -> ServerSocket:
        """Bind a ROUTER socket. Raises ``OSError`` when the address is taken, ``ConfigError`` if exposed."""
        return self._keep(Server(self, address, handler, entrance))

    def client(
        self,
        address: str,
        handler: FramesHandler,
        *,
        server_key: str = "",
        on_disconnect: DisconnectHandler | None = None,
    ) -> ClientSocket:
        """Connect a DEALER socket; ``server_key`` (Z85): only of who is in no key file (CURVE).

        Raises ``OSError`` for an address or a key that cannot be one, and when there can be no more sockets;
        a peer that is absent is no error."""
        return self._keep(Client(self, address, handler, server_key, on_disconnect))

    def publisher(self, address: str, entrance: Entrance = Entrance.ANY) -> PublisherSocket:
        return self._keep(Publisher(self, address, entrance))

    def subscriber(self, address: str, handler: FramesHandler, *, server_key: str = "") -> ClientSocket:
        return self._keep(Subscriber(self, address, handler, server_key))

    def _keep(self, socket: S) -> S:
        self.sockets.append(socket)
        return socket

    def close(self) -> None:
        super().close()
        # libzmq waits for every connection to end, and may do so for ever (seen once, of a ROUTER whose peer
        # went at the same time): no service may wait with it.
        ending = threading.Thread(target=self.context.term, name="bus-close", daemon=True)
        ending.start()
        ending.join(self.linger_ms / 1000 + CLOSE_S)
        if ending.is_alive():
            _logger.error(log.BUS_NOT_CLOSED, waited_s=self.linger_ms / 1000 + CLOSE_S)
