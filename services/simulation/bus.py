"""Sockets of simulated processes: the ``Bus`` of protocol/bus/transport.py over a :class:`Network`.

Owns addresses, peers and reconnection, as ZeroMQ has them: a client queues until its server is there, keeps
its peer id when it reconnects, and loses what was on its way when a connection breaks; a server refuses to
send to a peer that is gone; a subscriber misses what was published before it had subscribed.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from microserve.protocol.bus.transport import FramesHandler, PeerHandler
from microserve.protocol.security.rights import EVERYBODY, Entrance
from microserve.services.simulation.loop import Process
from microserve.services.simulation.network import HIGH_WATER_MARK, RECONNECT_S, Endpoint, Network


class Addresses:
    """Who is bound where, in the whole mesh."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.servers: dict[str, SimServer] = {}
        self.publishers: dict[str, SimPublisher] = {}
        self.clients: list[SimClient | SimSubscriber] = []
        self.exhausted: set[str] = set()
        """Processes, by name, that have every descriptor that they may have: they open no connection."""
        self.num_peers = 0

    def take_peer_id(self) -> bytes:
        self.num_peers += 1
        return b"p%d" % self.num_peers

    def crash(self, process: Process) -> None:
        """The process is gone: the kernel closes its sockets and resets its connections."""
        for server in [s for s in self.servers.values() if s.process is process]:
            server.close()
        for publisher in [p for p in self.publishers.values() if p.process is process]:
            publisher.close()
        for client in [c for c in self.clients if c.process is process]:
            client.close()


class SimServer:
    """A ROUTER socket."""

    sender_key = ""
    """Processes here have no keys."""
    sender_roles = EVERYBODY

    def __init__(self, addresses: Addresses, process: Process, address: str, handler: PeerHandler) -> None:
        if address in addresses.servers:
            raise OSError(98, f"cannot bind {address}: Address already in use")
        self.address = address
        self.process = process
        self._addresses = addresses
        self._handler = handler
        self._peers: dict[bytes, SimClient] = {}
        self._is_open = True
        addresses.servers[address] = self

    def accept(self, client: SimClient) -> Endpoint:
        """A connection was made; where its messages go."""
        peer = client.peer_id
        self._peers[peer] = client
        return Endpoint(self.process, lambda frames: self._deliver(peer, frames))

    def forget(self, client: SimClient) -> None:
        if self._peers.get(client.peer_id) is client:
            del self._peers[client.peer_id]

    def _deliver(self, peer: bytes, frames: list[bytes]) -> None:
        if self._is_open:
            self._handler(peer, frames)

    def send(self, peer: bytes, frames: Sequence[bytes]) -> bool:
        client = self._peers.get(peer)
        if not self._is_open or not self.process.is_alive or client is None:
            return False
        self._addresses.network.carry(self.process, client.endpoint, frames)
        return True

    def close(self) -> None:
        if self._is_open:
            self._is_open = False
            del self._addresses.servers[self.address]
            network = self._addresses.network
            for client in list(self._peers.values()):
                if self.process.is_alive:  # what was sent still arrives
                    network.after(client.endpoint, network.latency(), partial(client.cut, self))
                else:
                    client.cut(self)
            self._peers.clear()


class SimClient:
    """A DEALER socket."""

    def __init__(
        self,
        addresses: Addresses,
        process: Process,
        address: str,
        handler: FramesHandler,
        on_disconnect: Callable[[], None] | None,
    ) -> None:
        self.process = process
        self.peer_id = addresses.take_peer_id()
        self.address = address
        self.endpoint = Endpoint(process, self._deliver)
        """Where answers arrive."""
        self._addresses = addresses
        self._handler = handler
        self._on_disconnect = on_disconnect
        self._unsent: deque[list[bytes]] = deque()
        self._server: SimServer | None = None
        self._out: Endpoint | None = None
        self._is_open = True
        addresses.clients.append(self)
        self._try_later(addresses.network.latency())

    def _deliver(self, frames: list[bytes]) -> None:
        if self._is_open:
            self._handler(frames)

    def _try_later(self, delay_s: float) -> None:
        self._addresses.network.after(self.endpoint, delay_s, self._try)

    def _try(self) -> None:
        """Connecting needs both ways free."""
        if not self._is_open or self._server is not None:
            return
        network, server = self._addresses.network, self._addresses.servers.get(self.address)
        if server is None or not server.process.is_alive:
            self._try_later(RECONNECT_S)
            return
        here, there = self.process.name, server.process.name
        if network.is_blocked(here, there) or network.is_blocked(there, here):
            self._try_later(RECONNECT_S)
            return
        self._server = server
        self._out = server.accept(self)
        while self._unsent:
            network.carry(self.process, self._out, self._unsent.popleft())

    def send(self, frames: Sequence[bytes]) -> bool:
        if not self._is_open or not self.process.is_alive:
            return False
        if self._out is not None:
            self._addresses.network.carry(self.process, self._out, frames)
            return True
        if len(self._unsent) >= HIGH_WATER_MARK:
            return False
        self._unsent.append(list(frames))
        return True

    def cut(self, expected: SimServer | None = None) -> None:
        """The connection (that to ``expected``) breaks: what is on its way, either way, is lost; it is made
        anew by itself."""
        server, network = self._server, self._addresses.network
        if server is None or (expected is not None and server is not expected):
            return
        server.forget(self)
        if self._out is not None:
            self._out.is_open = False
        self._server = self._out = None
        old, self.endpoint = self.endpoint, Endpoint(self.process, self._deliver)
        old.is_open = False
        network.after(self.endpoint, network.latency(), self._disconnected)

    def _disconnected(self) -> None:
        if not self._is_open:
            return
        self._try_later(RECONNECT_S)
        if self._on_disconnect is not None:
            self._on_disconnect()

    def close(self, *, lingers: bool = True) -> None:
        """What was sent still arrives, unless the process is dead or does not care."""
        if not self._is_open:
            return
        self._is_open = False
        self._addresses.clients.remove(self)
        server, out = self._server, self._out
        if server is not None and out is not None:
            if not (lingers and self.process.is_alive):
                out.is_open = False
            network = self._addresses.network
            network.after(out, network.latency(), lambda: server.forget(self))
        self._server = self._out = None


class SimPublisher:
    """A PUB socket."""

    def __init__(self, addresses: Addresses, process: Process, address: str) -> None:
        if address in addresses.publishers:
            raise OSError(98, f"cannot bind {address}: Address already in use")
        self.address = address
        self.process = process
        self.subscribers: list[SimSubscriber] = []
        self._addresses = addresses
        self._is_open = True
        addresses.publishers[address] = self

    def send(self, frames: Sequence[bytes]) -> bool:
        if not self._is_open or not self.process.is_alive:
            return False
        for subscriber in self.subscribers:
            self._addresses.network.carry(self.process, subscriber.endpoint, frames)
        return True

    def close(self) -> None:
        if self._is_open:
            self._is_open = False
            del self._addresses.publishers[self.address]
            for subscriber in list(self.subscribers):
                subscriber.cut()


class SimSubscriber:
    """A SUB socket, subscribed to everything."""

    def __init__(self, addresses: Addresses, process: Process, address: str, handler: FramesHandler) -> None:
        self.process = process
        self.address = address
        self.endpoint = Endpoint(process, self._deliver)
        self._addresses = addresses
        self._handler = handler
        self._publisher: SimPublisher | None = None
        self._is_open = True
        addresses.clients.append(self)
        self._try_later(addresses.network.latency())

    def _deliver(self, frames: list[bytes]) -> None:
        if self._is_open:
            self._handler(frames)

    def _try_later(self, delay_s: float) -> None:
        self._addresses.network.after(self.endpoint, delay_s, self._try)

    def _try(self) -> None:
        if not self._is_open or self._publisher is not None:
            return
        publisher = self._addresses.publishers.get(self.address)
        if publisher is None:
            self._try_later(RECONNECT_S)
            return
        self._publisher = publisher
        publisher.subscribers.append(self)

    def send(self, frames: Sequence[bytes]) -> bool:
        raise TypeError("a subscriber does not send")

    def cut(self) -> None:
        publisher, self._publisher = self._publisher, None
        if publisher is None:
            return
        publisher.subscribers.remove(self)
        self.endpoint.is_open = False
        self.endpoint = Endpoint(self.process, self._deliver)
        self._try_later(RECONNECT_S)

    def close(self, *, lingers: bool = True) -> None:
        if not self._is_open:
            return
        self._is_open = False
        self._addresses.clients.remove(self)
        if self._publisher is not None:
            self._publisher.subscribers.remove(self)
            self._publisher = None


class SimBus:
    """The sockets of one simulated process."""

    public_key = ""

    def __init__(self, addresses: Addresses, process: Process) -> None:
        self._addresses = addresses
        self._process = process

    def server(self, address: str, handler: PeerHandler, entrance: Entrance = Entrance.ANY) -> SimServer:
        return SimServer(self._addresses, self._process, address, handler)

    def client(
        self,
        address: str,
        handler: FramesHandler,
        *,
        server_key: str = "",
        on_disconnect: Callable[[], None] | None = None,
    ) -> SimClient:
        self._take_descriptor()
        return SimClient(self._addresses, self._process, address, handler, on_disconnect)

    def publisher(self, address: str, entrance: Entrance = Entrance.ANY) -> SimPublisher:
        return SimPublisher(self._addresses, self._process, address)

    def _take_descriptor(self) -> None:
        if self._process.name in self._addresses.exhausted:
            raise OSError(errno.EMFILE, "no socket: Too many open files")

    def subscriber(self, address: str, handler: FramesHandler, *, server_key: str = "") -> SimSubscriber:
        self._take_descriptor()
        return SimSubscriber(self._addresses, self._process, address, handler)

    def close(self) -> None:
        """Sockets are closed by those who opened them, or by :meth:`Addresses.crash`."""
