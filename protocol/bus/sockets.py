"""Plain ZeroMQ sockets in an asyncio loop, one class for each kind that the mesh uses.

Owns a socket's options, its place in the loop, and whose message is not even looked at (a key that is trusted
no more). ``transport.py`` says how they are used, and makes them. Nothing outside this file may touch a
socket.

The FD is edge-triggered and *any* use of the socket takes the edge, so two rules keep it from hanging:
drain until ``Again`` (or reschedule the drain), and look at EVENTS again after every send, refused ones too.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import secrets
import sys
from collections.abc import Callable, Iterator, Sequence

import structlog
import zmq
from zmq.backend import Socket as Plain

from microserve.protocol import log
from microserve.protocol.bus.address import is_ipv6
from microserve.protocol.bus.curve import CurveKeys, check_exposure
from microserve.protocol.security.connections import Gate
from microserve.protocol.security.guard import Guard
from microserve.protocol.security.rights import EVERYBODY, NOBODY, Entrance, Roles
from microserve.protocol.security.trust import Trust
from microserve.protocol.types import MAX_BULK_NBYTES, NO_KEY

MAX_FRAMES_PER_TURN = 256
"""Messages drained before the loop gets its turn again."""
_NOBLOCK, _MORE = int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE)
"""For ``Plain``: pyzmq's own methods make flags of numbers, and ask after every frame for the next: more than
half of what a message costs here."""
GIVE_UP_S = 5.0
"""A TCP connection on which nothing is acknowledged for so long is given up, at both ends. The kernel's own
patience is a quarter of an hour, and hours where nothing is sent; and the longer it has been in vain, the
longer it waits to try again, also where the network is well by then."""
CONNECT_S = 2.0
"""So long for one attempt to connect, for the same reason; the next one follows."""
KEEPALIVE_IDLE_S, KEEPALIVE_INTERVAL_S, KEEPALIVE_COUNT = 5, 1, 5
"""The kernel asks a silent peer's kernel: a process that is stopped or busy has one that answers."""
FRAMING_NBYTES = 42
"""What ZMTP and CURVE add to a frame, at most."""

PeerHandler = Callable[[bytes, list[bytes]], None]
"""Called with the peer's routing id and the frames behind the envelope."""
FramesHandler = Callable[[list[bytes]], None]
DisconnectHandler = Callable[[], None]
"""Called when an established connection has gone, after what had come by it was handed over."""

_logger = structlog.get_logger()


class Wiring:
    """What the sockets of one process share."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        *,
        high_water_mark: int,
        linger_s: float,
        give_up_s: float,
        keys: CurveKeys | None,
        insecure: bool,
    ) -> None:
        self.context = context
        self.give_up_ms = int(give_up_s * 1000)
        self.high_water_mark = high_water_mark
        self.linger_ms = int(linger_s * 1000)
        self.keys = keys
        self.insecure = insecure
        """Without keys also where other machines reach us."""
        self.sent = self.received = self.dropped = self.failed = self.refused = 0
        self.sockets: list[_Socket] = []
        self.trust = Trust(keys.trusted.parent) if keys is not None else None
        self._guard: Guard | None = None

    @property
    def guard(self) -> Guard:
        """Made with the first socket that is bound: who only calls needs none."""
        if self._guard is None:
            self._guard = Guard(self.context, self.trust)
        return self._guard

    def make_socket(self, kind: int) -> zmq.Socket[bytes]:
        """Raises ``OSError`` when there is none to be had."""
        try:
            return self.context.socket(kind)
        except zmq.ZMQError as error:
            raise OSError(error.errno, f"no socket: {error.strerror}") from None

    def roles(self, key: str) -> Roles:
        return EVERYBODY if self.trust is None else self.trust.roles(key)

    def close(self) -> None:
        for each in list(self.sockets):
            each.close()
        if self._guard is not None:
            self._guard.stop()
            self._guard = None


class _Socket:
    """One plain socket and its place in the loop."""

    def __init__(self, bus: Wiring, kind: int, handler: FramesHandler | None) -> None:
        self._bus = bus
        self._handler = handler
        self._loop = asyncio.get_running_loop()
        self._context = contextvars.copy_context()
        """Of who opened it: what comes in is handled there, not in the context of whoever sends by chance."""
        self._gate: Gate | None = None
        """Of a socket that is bound."""
        self._socket = bus.make_socket(kind)
        self._socket.set_hwm(bus.high_water_mark)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_BULK_NBYTES)
        self._bound_silence(bus.give_up_ms)
        self._closed = False
        self._drain_due = False
        self.address = ""

    def _bound_silence(self, give_up_ms: int) -> None:
        self._socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
        self._socket.setsockopt(zmq.TCP_KEEPALIVE_IDLE, KEEPALIVE_IDLE_S)
        self._socket.setsockopt(zmq.TCP_KEEPALIVE_INTVL, KEEPALIVE_INTERVAL_S)
        self._socket.setsockopt(zmq.TCP_KEEPALIVE_CNT, KEEPALIVE_COUNT)
        self._socket.setsockopt(zmq.TCP_MAXRT, give_up_ms)
        self._socket.setsockopt(zmq.CONNECT_TIMEOUT, int(CONNECT_S * 1000))

    def _start(self) -> None:
        if self._handler is not None:
            self._loop.add_reader(self._socket.fileno(), self._drain)
            self._schedule_drain()

    def bind(self, address: str, entrance: Entrance) -> None:
        with self._closed_on_failure(f"cannot bind {address}"):
            if entrance is not Entrance.OPEN:
                if not self._bus.insecure:
                    check_exposure(address, self._bus.keys)
                if self._bus.keys is not None:
                    self._bus.keys.apply_to_server(self._socket)
            self._socket.setsockopt(zmq.IPV6, is_ipv6(address))
            self._gate = self._bus.guard.watch(self._socket, entrance)
            self._socket.bind(address)
        self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._start()

    def connect(self, address: str, server_key: str) -> None:
        with self._closed_on_failure(f"cannot connect to {address}"):
            if self._bus.keys is not None and server_key != NO_KEY:
                self._bus.keys.apply_to_client(self._socket, address, server_key)
            self._socket.setsockopt(zmq.IPV6, is_ipv6(address))
            self._socket.connect(address)
        self.address = address
        self._start()

    @contextlib.contextmanager
    def _closed_on_failure(self, what: str) -> Iterator[None]:
        """A socket left open would keep ``ZmqBus.close`` waiting for ever."""
        try:
            yield
        except zmq.ZMQError as error:
            self._abandon()
            raise OSError(error.errno, f"{what}: {error.strerror}") from None
        except BaseException:
            self._abandon()
            raise

    def _abandon(self) -> None:
        if self._gate is not None:
            self._bus.guard.unwatch(self._socket, self._gate)
        self._socket.close(0)

    def _schedule_drain(self) -> None:
        """Once: a handler that answers each of many messages must not queue a drain for each answer."""
        if not self._drain_due:
            self._drain_due = True
            self._loop.call_soon(self._drain, context=self._context)

    def _drain(self) -> None:
        self._drain_due = False
        if self._closed:
            return
        for _ in range(MAX_FRAMES_PER_TURN):
            try:
                frames = self._take()
            except zmq.Again:
                if self._gate is not None:
                    self._gate.num_drained += 1
                return
            self._bus.received += 1
            if frames is not None:
                self._handle(frames)
            if self._closed:
                return
        self._schedule_drain()

    def _take(self) -> list[bytes] | None:
        """None: a message of somebody who has no say any more. Raises ``zmq.Again``."""
        part = Plain.recv(self._socket, _NOBLOCK, copy=False)
        frames = [part.bytes]
        while part.more:
            part = Plain.recv(self._socket, _NOBLOCK, copy=False)
            frames.append(part.bytes)
        return frames

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
            # Who takes the first frame takes them all.
            for frame in frames[:-1]:
                Plain.send(self._socket, frame, _MORE)
            Plain.send(self._socket, frames[-1], _NOBLOCK)
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
        if self._gate is not None:
            self._bus.guard.unwatch(self._socket, self._gate)
        self._socket.close(self._bus.linger_ms if lingers else 0)
        if self in self._bus.sockets:
            self._bus.sockets.remove(self)


class Server(_Socket):
    def __init__(self, bus: Wiring, address: str, handler: PeerHandler, entrance: Entrance) -> None:
        super().__init__(bus, zmq.ROUTER, lambda frames: handler(frames[0], frames[1:]))
        self.sender_key = ""
        self._asks_for_keys = bus.keys is not None and entrance is not Entrance.OPEN
        self.sender_roles = NOBODY if self._asks_for_keys else EVERYBODY
        self._has_descriptors = address.startswith("tcp://")
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self.bind(address, entrance)

    def send(self, peer: bytes, frames: Sequence[bytes]) -> bool:
        return self.transmit([peer, *frames])

    def _take(self) -> list[bytes] | None:
        last = Plain.recv(self._socket, _NOBLOCK, copy=False)
        frames = [last.bytes]
        while last.more:
            last = Plain.recv(self._socket, _NOBLOCK, copy=False)
            frames.append(last.bytes)
        descriptor = int(last.get(zmq.SRCFD)) if self._has_descriptors else -1
        handed = self._bus.guard.handed
        nbytes = sum(map(len, frames)) + len(frames) * FRAMING_NBYTES
        handed[descriptor] = handed.get(descriptor, 0) + nbytes
        if self._asks_for_keys:
            # The guard's answer (ZAP, RFC 27) names the key of the connection that a message came by.
            self.sender_key = key = str(last.get("User-Id"))
            self.sender_roles = self._bus.roles(key)
            if not self.sender_roles:
                self._bus.refused += 1
                self._bus.guard.cut(descriptor)
                return None
        return frames


class Client(_Socket):
    def __init__(
        self,
        bus: Wiring,
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
        self._loop.call_soon(
            self._drain_events, context=self._context
        )  # the FD is as edge-triggered as any other

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
            self._loop.call_soon(self._tell_disconnect, context=self._context)
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


class Publisher(_Socket):
    def __init__(self, bus: Wiring, address: str, entrance: Entrance) -> None:
        super().__init__(bus, zmq.PUB, None)
        self.bind(address, entrance)

    def send(self, frames: Sequence[bytes]) -> bool:
        return self.transmit(frames)


class Subscriber(_Socket):
    def __init__(self, bus: Wiring, address: str, handler: FramesHandler, server_key: str) -> None:
        super().__init__(bus, zmq.SUB, handler)
        self._socket.setsockopt(zmq.SUBSCRIBE, b"")
        self.connect(address, server_key)

    def send(self, frames: Sequence[bytes]) -> bool:
        raise TypeError("a subscriber does not send")
