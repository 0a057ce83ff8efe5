"""ZeroMQ sockets inside an asyncio loop: plain sockets, their FD watched, drained with NOBLOCK.

Owns every socket of a process, its options and its CURVE keys; knows frames, not messages. ``zmq.asyncio``
is not used: a cancelled ``recv`` can lose a message there, and it costs two thirds of the throughput.

The FD is edge-triggered and *any* use of the socket takes the edge, so two rules keep it from hanging:
drain until ``Again`` (or reschedule the drain), and look at EVENTS again after every send, refused ones too.
Nothing outside this module may touch a socket.

High-water marks: ROUTER sockets refuse at theirs (ROUTER_MANDATORY: the refusal is an error, counted here),
so whatever must not be lost goes by credit (credit.py) and stays far below it. What a reconnect loses in
silence is found by the numbers of numbered.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

import structlog
import zmq

from microserve.protocol import log
from microserve.protocol.bus.curve import CurveKeys, check_exposure
from microserve.protocol.types import MAX_BULK_NBYTES

MAX_FRAMES_PER_TURN = 256
"""Messages drained before the loop gets its turn again."""

PeerHandler = Callable[[bytes, list[bytes]], None]
"""Called with the peer's routing id and the frames behind the envelope."""
FramesHandler = Callable[[list[bytes]], None]
DisconnectHandler = Callable[[], None]
"""Called when an established connection has gone, after what had come by it was handed over."""

_logger = structlog.get_logger()


class ServerSocket(Protocol):
    """Many peers, each answered by its routing id."""

    @property
    def address(self) -> str: ...
    @property
    def sender_key(self) -> str:
        """Public key (Z85) of who sent the message that is being handled; empty when it cannot be known."""
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

    def server(self, address: str, handler: PeerHandler) -> ServerSocket: ...
    def client(
        self,
        address: str,
        handler: FramesHandler,
        *,
        server_key: str = "",
        on_disconnect: DisconnectHandler | None = None,
    ) -> ClientSocket: ...
    def publisher(self, address: str) -> PublisherSocket: ...
    def subscriber(self, address: str, handler: FramesHandler, *, server_key: str = "") -> ClientSocket: ...
    def close(self) -> None: ...


class _Socket:
    """One plain socket and its place in the loop."""

    def __init__(self, bus: ZmqBus, kind: int, handler: FramesHandler | None) -> None:
        self._bus = bus
        self._handler = handler
        self._loop = asyncio.get_running_loop()
        self._socket = bus.make_socket(kind)
        self._socket.set_hwm(bus.high_water_mark)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_BULK_NBYTES)
        self._socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
        self._closed = False
        self._drain_due = False
        self.address = ""

    def _start(self) -> None:
        if self._handler is not None:
            self._loop.add_reader(self._socket.fileno(), self._drain)
            self._schedule_drain()

    def bind(self, address: str) -> None:
        with self._closed_on_failure(f"cannot bind {address}"):
            check_exposure(address, self._bus.keys)
            self._bus.secure_server(self._socket)
            self._socket.bind(address)
        self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._start()

    def connect(self, address: str, server_key: str) -> None:
        with self._closed_on_failure(f"cannot connect to {address}"):
            self._bus.secure_client(self._socket, address, server_key)
            self._socket.connect(address)
        self.address = address
        self._start()

    @contextlib.contextmanager
    def _closed_on_failure(self, what: str) -> Iterator[None]:
        """A socket left open would keep ``ZmqBus.close`` waiting for ever."""
        try:
            yield
        except zmq.ZMQError as error:
            self._socket.close(0)
            raise OSError(error.errno, f"{what}: {error.strerror}") from None
        except BaseException:
            self._socket.close(0)
            raise

    def _schedule_drain(self) -> None:
        """Once: a handler that answers each of many messages must not queue a drain for each answer."""
        if not self._drain_due:
            self._drain_due = True
            self._loop.call_soon(self._drain)

    def _drain(self) -> None:
        self._drain_due = False
        if self._closed:
            return
        for _ in range(MAX_FRAMES_PER_TURN):
            try:
                frames = self._take()
            except zmq.Again:
                return
            self._bus.received += 1
            self._handle(frames)
            if self._closed:
                return
        self._schedule_drain()

    def _take(self) -> list[bytes]:
        return self._socket.recv_multipart(zmq.NOBLOCK)

    def _handle(self, frames: list[bytes]) -> None:
        handler = self._handler
        if handler is None:
            return
        try:
            handler(frames)
        except Exception:
            # One message must never end a service: the handler answers what it can, the rest is ours to log.
            self._bus.failed += 1
            _logger.exception(log.BUS_HANDLER_FAILED, address=self.address)

    def transmit(self, frames: Sequence[bytes]) -> bool:
        """False, and counted, when the peer is gone or its queue is full."""
        if self._closed:
            return False
        taken = True
        try:
            self._socket.send_multipart(frames, zmq.NOBLOCK)
            self._bus.sent += 1
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EAGAIN, zmq.EHOSTUNREACH):
                raise
            taken = False
            self._bus.dropped += 1
        if self._handler is not None and int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            self._schedule_drain()
        return taken

    def close(self, *, lingers: bool = True) -> None:
        if self._closed:
            return
        self._closed = True
        if self._handler is not None:
            self._loop.remove_reader(self._socket.fileno())
        self._socket.close(self._bus.linger_ms if lingers else 0)
        self._bus.forget(self)


class _Server(_Socket):
    sender_key = ""

    def __init__(self, bus: ZmqBus, address: str, handler: PeerHandler) -> None:
        super().__init__(bus, zmq.ROUTER, lambda frames: handler(frames[0], frames[1:]))
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self.bind(address)

    def send(self, peer: bytes, frames: Sequence[bytes]) -> bool:
        return self.transmit([peer, *frames])

    def _take(self) -> list[bytes]:
        if self._bus.keys is None:
            return super()._take()
        # The authenticator's answer (ZAP, RFC 27) names the key of the connection that a message came by.
        frames = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
        user_id = frames[-1].get("User-Id")
        self.sender_key = user_id if isinstance(user_id, str) else ""
        return [frame.bytes for frame in frames]


class _Client(_Socket):
    def __init__(
        self,
        bus: ZmqBus,
        address: str,
        handler: FramesHandler,
        server_key: str,
        on_disconnect: DisconnectHandler | None,
    ) -> None:
        super().__init__(bus, zmq.DEALER, handler)
        # A name of our own, unguessable, so that a reconnect is the same peer (ROUTER_HANDOVER there).
        self._socket.setsockopt(zmq.ROUTING_ID, b"m" + secrets.token_bytes(15))
        self._monitor: zmq.Socket[bytes] | None = None
        self._on_disconnect = on_disconnect
        self._established = False
        try:
            if on_disconnect is not None:
                self._watch_connection()
            self.connect(address, server_key)
        except BaseException:
            self._close_monitor()
            self._socket.close(0)
            raise

    def send(self, frames: Sequence[bytes]) -> bool:
        return self.transmit(frames)

    # --- the connection under the socket ------------------------------------------------------------

    def _watch_connection(self) -> None:
        """Must precede the connect, so that no event is missed."""
        name = f"inproc://monitor-{secrets.token_hex(8)}"
        self._socket.monitor(name, zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        self._monitor = self._bus.make_socket(zmq.PAIR)
        self._monitor.connect(name)
        self._loop.add_reader(self._monitor.fileno(), self._drain_events)
        self._loop.call_soon(self._drain_events)  # the FD is as edge-triggered as any other

    def _drain_events(self) -> None:
        while self._monitor is not None:
            try:
                event = self._monitor.recv_multipart(zmq.NOBLOCK)[0]
            except zmq.Again:
                return
            kind = int.from_bytes(event[:2], sys.byteorder)
            if kind == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._established = True
            elif self._established:  # else a connection that never came about was given up
                self._established = False
                self._tell_disconnect()

    def _tell_disconnect(self) -> None:
        """Once the socket is empty: the peer's last words may still be in it."""
        self._drain()
        if self._closed or self._on_disconnect is None:
            return
        if self._drain_due:
            self._loop.call_soon(self._tell_disconnect)
            return
        try:
            self._on_disconnect()
        except Exception:
            self._bus.failed += 1
            _logger.exception(log.BUS_HANDLER_FAILED, address=self.address)

    def _close_monitor(self) -> None:
        monitor, self._monitor = self._monitor, None
        if monitor is not None:
            self._loop.remove_reader(monitor.fileno())
            monitor.close(0)

    def close(self, *, lingers: bool = True) -> None:
        if not self._closed and self._monitor is not None:
            self._socket.disable_monitor()
            self._close_monitor()
        super().close(lingers=lingers)


class _Publisher(_Socket):
    def __init__(self, bus: ZmqBus, address: str) -> None:
        super().__init__(bus, zmq.PUB, None)
        self.bind(address)

    def send(self, frames: Sequence[bytes]) -> bool:
        return self.transmit(frames)


class _Subscriber(_Socket):
    def __init__(self, bus: ZmqBus, address: str, handler: FramesHandler, server_key: str) -> None:
        super().__init__(bus, zmq.SUB, handler)
        self._socket.setsockopt(zmq.SUBSCRIBE, b"")
        self.connect(address, server_key)

    def send(self, frames: Sequence[bytes]) -> bool:
        raise TypeError("a subscriber does not send")


S = TypeVar("S", bound=_Socket)


class ZmqBus:
    """The sockets of one process. Make it inside the running loop; ``close`` ends them all."""

    def __init__(
        self,
        *,
        high_water_mark: int = 10_000,
        linger_s: float = 1.0,
        keys: CurveKeys | None = None,
    ) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.high_water_mark = high_water_mark
        self.linger_ms = int(linger_s * 1000)
        self.keys = keys
        self.sent = self.received = self.dropped = self.failed = 0
        self._sockets: list[_Socket] = []
        self._authenticator = keys.start_authenticator(self.context) if keys else None

    def make_socket(self, kind: int) -> zmq.Socket[bytes]:
        """Raises ``OSError`` when there is none to be had."""
        try:
            return self.context.socket(kind)
        except zmq.ZMQError as error:
            raise OSError(error.errno, f"no socket: {error.strerror}") from None

    @property
    def public_key(self) -> str:
        return self.keys.public.decode() if self.keys is not None else ""

    def secure_server(self, socket: zmq.Socket[bytes]) -> None:
        if self.keys is not None:
            self.keys.apply_to_server(socket)

    def secure_client(self, socket: zmq.Socket[bytes], address: str, server_key: str) -> None:
        if self.keys is not None:
            self.keys.apply_to_client(socket, address, server_key)

    def server(self, address: str, handler: PeerHandler) -> ServerSocket:
        """Bind a ROUTER socket. Raises ``OSError`` when the address is taken, ``ConfigError`` if exposed."""
        return self._keep(_Server(self, address, handler))

    def client(
        self,
        address: str,
        handler: FramesHandler,
        *,
        server_key: str = "",
        on_disconnect: DisconnectHandler | None = None,
    ) -> ClientSocket:
        """Connect a DEALER socket; ``server_key`` (Z85): only of who is in no key file (CURVE).

        Raises ``OSError`` for an address or a key that cannot be one; a peer that is absent is no error."""
        return self._keep(_Client(self, address, handler, server_key, on_disconnect))

    def publisher(self, address: str) -> PublisherSocket:
        return self._keep(_Publisher(self, address))

    def subscriber(self, address: str, handler: FramesHandler, *, server_key: str = "") -> ClientSocket:
        return self._keep(_Subscriber(self, address, handler, server_key))

    def _keep(self, socket: S) -> S:
        self._sockets.append(socket)
        return socket

    def forget(self, socket: _Socket) -> None:
        if socket in self._sockets:
            self._sockets.remove(socket)

    def close(self) -> None:
        for socket in list(self._sockets):
            socket.close()
        if self._authenticator is not None:
            self._authenticator.stop()
        self.context.term()
