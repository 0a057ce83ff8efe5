"""The guard of a process's sockets: a thread that says who is let in, and cuts who costs too much.

Owns the ZAP handler (RFC 27: which key may enter where, by trust.py and rights.py), the monitors of bound
sockets, and ``shutdown`` of single connections, which libzmq has no call for. A connection is cut only if its
descriptor still has the peer's address that it was accepted with. Decides nothing about bytes
(connections.py).

A thread and not a task: whoever floods a service must be cut while its loop is busy with the flood. It ends
with the bus, and no error of one connection, file or log line ends it before."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import os
import resource
import secrets
import socket
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final

import structlog
import zmq
from zmq.utils import z85

from microserve.protocol import log
from microserve.protocol.security.connections import KIB, MIB, Connections, Gate, Limits, Verdict
from microserve.protocol.security.rights import Entrance, may_enter
from microserve.protocol.security.trust import Trust
from microserve.protocol.types import MAX_REQUEST_FRAME_NBYTES

TICK_S: Final = 0.05
"""Between two looks at what connections hold; more where there are many of them."""
LOOK_S: Final = 1e-4
"""Pause for each connection that a look reads, so that looking costs a few per cent of a core at most."""
REST_S: Final = 0.9
"""Between two such looks while all that is connected has a trusted key, and says next to nothing."""
TRUST_S: Final = REST_S
"""Between two looks at the files of keys."""
QUIET_NBYTES: Final = 64 * KIB
"""By one connection between two looks: next to nothing."""
HANDSHAKE_MS: Final = 3000
"""A peer that has not shown who it is by then is dropped (``ZMQ_HANDSHAKE_IVL``)."""
LOG_EACH_S: Final = 10.0
"""One line a key, or a reason, in so many seconds, with the count so far."""
MAX_LOGGED: Final = 256
MAX_REFUSED_KEYS: Final = 32

_SMALL = Limits(frame_nbytes=4 * KIB, first_nbytes=MIB, unfinished_nbytes=MIB, queued_nbytes=MIB)
"""Of sockets to which nobody has much to say. Who says nothing at all may be reading, and be kept alive by
ZMTP's pings: a MiB of those takes hours."""
_LARGE = Limits(
    frame_nbytes=MAX_REQUEST_FRAME_NBYTES,
    first_nbytes=256 * KIB,
    unfinished_nbytes=32 * MIB,
    queued_nbytes=256 * MIB,
)
_TOLD_LITTLE: Final = (Entrance.EVENTS, Entrance.REPLAY, Entrance.OPEN)
LIMITS: Final = {each: _SMALL if each in _TOLD_LITTLE else _LARGE for each in Entrance}

_ACCEPTED, _DISCONNECTED = int(zmq.EVENT_ACCEPTED), int(zmq.EVENT_DISCONNECTED)
_RECEIVED_OFFSET: Final = 128
"""Of ``tcpi_bytes_received`` in ``struct tcp_info`` (Linux 4.1)."""
_EVENT = struct.Struct("=HI")

_logger = structlog.get_logger()


class Guard:
    """Make it before the first socket is bound; :meth:`stop` it after the last is closed, before the context
    is terminated. Its methods are for the thread that owns the sockets."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], trust: Trust | None) -> None:
        """``trust``: None without keys."""
        self.handed: dict[int, int] = {}
        """Bytes of messages that were handed over, by descriptor; written by who reads the sockets."""
        self._context = context
        self._trust = trust
        self._connections = Connections()
        self._monitors: dict[zmq.Socket[bytes], Gate] = {}
        self._orders: deque[Callable[[], None]] = deque()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._stopping = False
        self._trusted_at = self._looked_at = self._stirred_at = time.monotonic()
        """``_stirred_at``: a connection last came, or brought more than next to nothing."""
        self._received: dict[int, int] = {}
        """Readings of the last look."""
        self._logged: dict[str, tuple[float, int]] = {}
        self._refused: dict[str, float] = {}
        """When a key was last turned away; written by our thread alone."""
        self._poller = zmq.Poller()
        self._poller.register(self._wake, zmq.POLLIN)
        self._zap: zmq.Socket[bytes] | None = None
        if trust is not None:
            self._zap = context.socket(zmq.REP)
            self._zap.bind("inproc://zeromq.zap.01")
            self._poller.register(self._zap, zmq.POLLIN)
        run = contextvars.copy_context().run  # what is bound to this process's log lines
        self._thread = threading.Thread(target=run, args=(self._run,), name="guard", daemon=True)
        self._thread.start()

    def watch(self, bound: zmq.Socket[bytes], entrance: Entrance) -> Gate:
        """Set the limits of a socket that is about to be bound, and keep them from then on."""
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        limits = LIMITS[entrance]  # and never more than half of our descriptors
        limits = dataclasses.replace(limits, num_connections=min(limits.num_connections, soft // 2))
        gate = Gate(str(entrance), limits)
        bound.setsockopt(zmq.MAXMSGSIZE, gate.limits.frame_nbytes)
        bound.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
        if self._trust is not None and entrance is not Entrance.OPEN:
            bound.setsockopt_string(zmq.ZAP_DOMAIN, str(entrance))
            bound.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # without a handler nobody is let in, not everybody
        name = f"inproc://guard-{secrets.token_hex(8)}"
        bound.monitor(name, _ACCEPTED | _DISCONNECTED)
        monitor = self._context.socket(zmq.PAIR)
        monitor.set_hwm(0)  # a full queue would stop libzmq's own thread
        monitor.connect(name)
        self._order(lambda: self._add(monitor, gate))
        return gate

    def unwatch(self, bound: zmq.Socket[bytes], gate: Gate) -> None:
        """Before the socket is closed."""
        bound.disable_monitor()
        self._order(lambda: self._remove(gate))

    def cut(self, descriptor: int) -> None:
        """End one connection, by the descriptor that its messages name."""
        self._order(lambda: self._cut_one(descriptor))

    def stop(self) -> None:
        self._stopping = True
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        while self._orders:
            self._orders.popleft()()
        for monitor in self._monitors:
            monitor.close(0)
        if self._zap is not None:
            self._zap.close(0)
        os.close(self._wake)

    # --- the thread --------------------------------------------------------------------------------

    def _order(self, order: Callable[[], None]) -> None:
        self._orders.append(order)
        os.eventfd_write(self._wake, 1)

    def _run(self) -> None:
        while not self._stopping:
            try:
                self._turn()
            except Exception:
                if self._context.closed:
                    return
                _log_safely("error", log.BUS_HANDLER_FAILED, socket="guard", exc_info=True)
                time.sleep(TICK_S)

    def _turn(self) -> None:
        num, now = len(self._connections), time.monotonic()
        tick_s = max(REST_S if self._rests(now) else TICK_S, num * LOOK_S)
        waits = [tick_s - (now - self._looked_at)] if num else []
        if self._trust is not None:
            waits.append(TRUST_S - (now - self._trusted_at))
        ready = dict(self._poller.poll(int(max(0.0, min(waits)) * 1000) + 1 if waits else None))
        if self._wake in ready:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wake)
            while self._orders:
                self._orders.popleft()()
        for monitor in [each for each in self._monitors if each in ready]:
            self._take_events(monitor)
        if self._zap is not None and self._zap in ready:
            self._answer(self._zap.recv_multipart())
        now = time.monotonic()
        early = now + TICK_S / 2  # what is due so soon would have it wake up twice
        is_due = bool(num) and early - self._looked_at >= tick_s
        if self._trust is not None:
            are_due = early - self._trusted_at >= TRUST_S
            if tick_s == REST_S:  # at rest both come by one wake-up
                are_due = is_due = are_due or is_due
            if are_due:
                self._refresh(now)
        if is_due:
            self._looked_at = now
            self._look()

    def _rests(self, now: float) -> bool:
        """For longer than a handshake may take nobody has come, and nobody has had much to say: whoever is
        here has shown a trusted key. Without keys anybody may be here."""
        return self._trust is not None and now - self._stirred_at > HANDSHAKE_MS / 1000 + TICK_S

    def _add(self, monitor: zmq.Socket[bytes], gate: Gate) -> None:
        self._monitors[monitor] = gate
        self._poller.register(monitor, zmq.POLLIN)

    def _remove(self, gate: Gate) -> None:
        for monitor in [each for each, its in self._monitors.items() if its is gate]:
            self._poller.unregister(monitor)
            del self._monitors[monitor]
            monitor.close(0)
        for verdict in self._connections.of(gate):
            self._connections.closed(verdict.descriptor)

    def refused_keys(self) -> dict[str, float]:
        """Seconds since each was last turned away. From any thread."""
        now = time.monotonic()
        return {key: now - at for key, at in self._refused.copy().items()}

    # --- who is let in -----------------------------------------------------------------------------

    def _answer(self, request: list[bytes]) -> None:
        """ZAP: 200 with the key as ``User-Id``, or 300: the peer is not answered and may try again, because
        its key may be trusted by then. (400 would end a libzmq client for good.)"""
        assert self._zap is not None
        try:
            version, request_id, domain, _, _, mechanism, *credentials = request
            key = z85.encode(credentials[0]).decode() if mechanism == b"CURVE" and credentials else ""
            is_let_in = version == b"1.0" and self._lets_in(key, domain.decode(errors="replace"))
        except Exception:
            _log_safely("error", log.BUS_HANDLER_FAILED, socket="zap", exc_info=True)
            version, request_id, key, is_let_in = b"1.0", [*request, b"", b""][1], "", False
        status, user = (b"200", key.encode()) if is_let_in else (b"300", b"")
        self._zap.send_multipart([b"1.0", request_id, status, b"", user, b""])

    def _lets_in(self, key: str, entrance: str) -> bool:
        assert self._trust is not None
        now = time.monotonic()
        if not may_enter(self._trust.roles(key), Entrance(entrance)) and now - self._trusted_at >= TICK_S:
            self._refresh(now)
        roles = self._trust.roles(key)
        if roles and may_enter(roles, Entrance(entrance)):
            return True
        self._refused.pop(key, None)
        if len(self._refused) >= MAX_REFUSED_KEYS:
            del self._refused[next(iter(self._refused))]
        self._refused[key] = now
        self._tell(key, log.PEER_REFUSED, key=key, socket=entrance, roles=sorted(roles))
        return False

    def _refresh(self, now: float) -> None:
        assert self._trust is not None
        self._trusted_at = now
        revoked = self._trust.refresh()
        if not revoked:
            return
        _log_safely("info", log.KEYS_REVOKED, keys=sorted(revoked))
        # Messages name their sender's key, so whoever reads a socket refuses them; who only listens says
        # nothing.
        for gate in list(self._monitors.values()):
            if gate.name == Entrance.EVENTS:
                for verdict in self._connections.of(gate):
                    self._cut(verdict)

    # --- who costs too much ------------------------------------------------------------------------

    def _take_events(self, monitor: zmq.Socket[bytes]) -> None:
        gate = self._monitors[monitor]
        while True:
            try:
                event = monitor.recv_multipart(zmq.NOBLOCK)[0]
            except zmq.Again:
                return
            kind, value = _EVENT.unpack(event[: _EVENT.size])
            if kind == _ACCEPTED:
                self._stirred_at = time.monotonic()
                verdict = self._connections.opened(value, gate, _peer_of(value))
                if verdict is not None:
                    self._cut(verdict)
            elif kind == _DISCONNECTED:
                self._connections.closed(value)
                self.handed.pop(value, None)  # the number may be somebody else's from now on

    def _look(self) -> None:
        for monitor in list(self._monitors):
            self._take_events(monitor)
        readings = {}
        for descriptor in list(self._connections):
            nbytes = _received_by(descriptor)
            if nbytes is not None:
                readings[descriptor] = nbytes
        before, self._received = self._received, readings
        if any(nbytes - before.get(fd, 0) > QUIET_NBYTES for fd, nbytes in readings.items()):
            self._stirred_at = time.monotonic()
        for verdict in self._connections.judge(readings, self.handed):
            self._cut(verdict)

    def _cut_one(self, descriptor: int) -> None:
        for monitor in list(self._monitors):
            self._take_events(monitor)
        verdict = self._connections.find(descriptor)
        if verdict is not None:
            self._cut(verdict)

    def _cut(self, verdict: Verdict) -> None:
        self._connections.closed(verdict.descriptor)
        with _borrowed(verdict.descriptor) as connection, contextlib.suppress(OSError):
            if connection.getpeername() != verdict.peer:
                return
            connection.shutdown(socket.SHUT_RDWR)
        self._tell(
            verdict.why, log.CONNECTION_CUT, socket=verdict.gate, why=verdict.why, nbytes=verdict.held_nbytes
        )

    def _tell(self, what: str, event: str, **fields: Any) -> None:
        """A line at most every ``LOG_EACH_S``, with the count so far: whoever is refused may try for ever."""
        at, count = self._logged.get(what, (float("-inf"), 0))
        now = time.monotonic()
        if now - at >= LOG_EACH_S:
            at = now
            _log_safely("warning", event, count=count + 1, **fields)
        if what not in self._logged and len(self._logged) >= MAX_LOGGED:
            del self._logged[next(iter(self._logged))]
        self._logged[what] = (at, count + 1)


@contextlib.contextmanager
def _borrowed(descriptor: int) -> Any:
    """A socket object around a descriptor that is libzmq's, and stays its."""
    # Of whichever family it is: this one has room for the addresses of both.
    borrowed = socket.socket(socket.AF_INET6, socket.SOCK_STREAM, 0, fileno=descriptor)
    try:
        yield borrowed
    finally:
        borrowed.detach()


def _peer_of(descriptor: int) -> Any:
    with contextlib.suppress(OSError), _borrowed(descriptor) as connection:
        return connection.getpeername()
    return None


def _received_by(descriptor: int) -> int | None:
    """Bytes that the kernel has taken from the peer; None of what is no TCP connection (any more)."""
    with contextlib.suppress(OSError), _borrowed(descriptor) as connection:
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _RECEIVED_OFFSET + 8)
        if len(info) == _RECEIVED_OFFSET + 8:
            return int.from_bytes(info[_RECEIVED_OFFSET:], sys.byteorder)
    return None


def _log_safely(level: str, event: str, **fields: Any) -> None:
    with contextlib.suppress(Exception):
        getattr(_logger, level)(event, **fields)
