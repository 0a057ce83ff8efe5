"""The owner's end of a door of TCP: one thread that takes connections, and puts what they bring into the
heap.

The fence. Bytes of a put reach the heap in one way only: this thread calls ``recvmsg_into`` on the
connection's socket. Tearing a connection down is closing that socket, by this very thread, so between two
such calls. What the writer had sent, or sends later, stays in the kernel, which throws it away: a writer
that was frozen, or on the other side of a cut network, meets a closed socket when it wakes. Only then are
its lanes given back. No timer takes part in that proof; time only decides when to tear down.

A writer that has died closes its end: what it had sent before is applied, in order, and then its lanes are
free. One that is frozen or cut off says nothing for ``silence_s``. Strangers have as long to say who they
are (greeting.py), cost a socket and 56 bytes each, and are at most ``MAX_STRANGERS``.

Owns sockets and the order of their turns. The bytes are inbound.py's, the lanes ``DoorLanes``'.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import threading
import time
from typing import Final

import msgspec
import structlog

from microserve.kvcache.heap.doors.door import SILENCE_S, Door, DoorLanes, Entrance, new_secret
from microserve.kvcache.heap.doors.tcp import frames
from microserve.kvcache.heap.doors.tcp.greeting import HELLO_NBYTES, OwnerGreeting, Terms
from microserve.kvcache.heap.doors.tcp.inbound import Frame, Inbound, SignalEach
from microserve.kvcache.heap.memfd import HeapFile
from microserve.kvcache.heap.shm import KIND as SHM
from microserve.kvcache.layout import KvLayout
from microserve.protocol import log
from microserve.protocol.errors import ConfigError, ProtocolViolation
from microserve.protocol.messages.kv.grant import MAX_LANES, HeapAddress

KIND: Final = "tcp"
MAX_WRITERS: Final = 256
MAX_STRANGERS: Final = 64
_MAX_UNREAD_NBYTES: Final = 1 << 16
"""Answers that a writer leaves unread; each is to a question of its own."""
_NO_DESCRIPTOR_S: Final = 0.01
_LOOK_S: Final = 0.05
"""How long a writer that sends nothing may not know that its grant is closed."""
_TURNS: Final = 16
"""Reads from one connection before the others have theirs."""

_logger = structlog.get_logger()


class Caller:
    """One connection."""

    def __init__(self, connection: socket.socket, peer: str, greeting: OwnerGreeting, now: float) -> None:
        self.socket = connection
        self.peer = peer
        self.greeting = greeting
        self.hello = bytearray()
        self.inbound: Inbound | None = None
        """None of a stranger."""
        self.out = bytearray()
        self.heard_at = now
        self.told: dict[int, int] = {}
        """By slot in which it holds a lane: the STATE that it knows."""
        self.is_awaited = False
        """Known, and not yet let in: something is made for it."""


class TcpDoor(Door):
    """Other kinds of door that have such a connection beside their own say what else belongs to a writer:
    :meth:`prepare`, then in the door's thread :meth:`admit`, :meth:`dismiss`, :meth:`on_wake`
    and :meth:`on_end`."""

    kind = KIND
    max_writers = MAX_WRITERS

    def __init__(
        self,
        heap: HeapAddress,
        layout: KvLayout,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        silence_s: float = SILENCE_S,
    ) -> None:
        """``heap``: of kind ``shm``, on this host; ``host`` is what other hosts reach this one by. Port 0:
        any.

        :class:`ConfigError` of field ``door_address`` if nothing can listen there."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._listening = socket.create_server((host, port), family=family, backlog=MAX_STRANGERS)
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {host} port {port}: {error}", field="door_address"
            ) from error
        port = self._listening.getsockname()[1]
        try:
            self._lanes = DoorLanes(HeapFile.open(heap, SHM, layout))
        except BaseException:
            self._listening.close()
            raise
        self._secret = new_secret()
        where = f"[{host}]:{port}" if family == socket.AF_INET6 else f"{host}:{port}"
        entrance = msgspec.msgpack.encode(Entrance(self._secret, where.encode()))
        self.address = msgspec.structs.replace(heap, kind=self.kind, fd=port, door=entrance)
        self._terms = Terms(self._lanes.layout, self._lanes.words.num_slots, silence_s)
        self._silence_s = silence_s
        self._callers: set[Caller] = set()
        self._listening.setblocking(False)
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._selector = selectors.DefaultSelector()
        self._is_closed = False
        try:
            self.prepare()
        except BaseException:
            self._selector.close()
            os.close(self._wake)
            self._listening.close()
            self._lanes.close()
            raise
        self._thread = threading.Thread(target=self._run, name=f"door-{self.kind}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        os.close(self._wake)

    # --- the thread --------------------------------------------------------------------------------

    def _run(self) -> None:
        selector = self._selector
        try:
            selector.register(self._listening, selectors.EVENT_READ, None)
            selector.register(self._wake, selectors.EVENT_READ, self)
            while not self._is_closed:
                is_told = any(caller.told for caller in self._callers)
                ready = selector.select(_LOOK_S if is_told else self._silence_s / 4)
                for key, events in ready:
                    if key.data is None:
                        self._accept()
                    elif isinstance(key.data, Caller):
                        self._serve(key.data, events)
                    else:
                        os.eventfd_read(self._wake)
                        self.on_wake()
                for caller in [caller for caller in self._callers if caller.told]:
                    self._tell_states(caller)
                # After everything that was there to be read has been read: we may have been frozen ourselves.
                self._tear_down_silent(time.monotonic())
        except Exception as error:
            _logger.exception(log.DOOR_FAILED, kind=self.kind, error=repr(error))
        finally:
            self._listening.close()
            for caller in list(self._callers):
                self._tear_down(caller, frames.LEFT)
            self.on_end()
            selector.close()
            self._lanes.close()

    def _accept(self) -> None:
        try:
            connection, peer = self._listening.accept()
        except BlockingIOError:  # it is gone again
            return
        except OSError:  # there is no descriptor for it now: the backlog keeps it
            time.sleep(_NO_DESCRIPTOR_S)
            return
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        strangers = [caller for caller in self._callers if caller.inbound is None]
        if len(strangers) >= MAX_STRANGERS:
            self._tear_down(min(strangers, key=lambda caller: caller.heard_at))
        caller = Caller(
            connection, f"{peer[0]}:{peer[1]}", OwnerGreeting(self.address, self._secret), time.monotonic()
        )
        self._callers.add(caller)
        self._selector.register(connection, selectors.EVENT_READ, caller)
        self._say(caller, caller.greeting.greeting)

    def _serve(self, caller: Caller, events: int) -> None:
        try:
            if events & selectors.EVENT_WRITE:
                self._say(caller, b"")
            if events & selectors.EVENT_READ:
                for _ in range(_TURNS):
                    if not self._read(caller):
                        break
        except ProtocolViolation as error:
            self._refuse(caller, error)
        except OSError:
            self._tear_down(caller)

    def _refuse(self, caller: Caller, error: ProtocolViolation) -> None:
        _logger.warning(log.DOOR_REFUSED, kind=self.kind, peer=caller.peer, detail=error.detail)
        self._tear_down(caller, frames.FAULT)

    def _read(self, caller: Caller) -> bool:
        """Take what is there; False when that is all."""
        inbound = caller.inbound
        try:
            if inbound is None:
                some = caller.socket.recv(max(1, HELLO_NBYTES - len(caller.hello)))
                if some and caller.is_awaited:
                    raise ProtocolViolation("a writer that does not wait for its welcome")
                nbytes, caller.hello = len(some), caller.hello + some
            else:
                buffers = inbound.buffers()
                room = sum(map(len, buffers))
                nbytes = caller.socket.recvmsg_into(buffers)[0]
        except BlockingIOError:
            return False
        if not nbytes:  # all that it sent before it left or died has been applied
            self._tear_down(caller)
            return False
        if inbound is None:
            if len(caller.hello) == HELLO_NBYTES:
                self._welcome(caller)
            return caller in self._callers
        caller.heard_at = time.monotonic()
        for frame in inbound.received(nbytes):
            self._apply(caller, frame)
        if caller.out:
            self._say(caller, b"")
        if caller not in self._callers:
            return False
        return nbytes == room  # else that was all

    def _welcome(self, caller: Caller) -> None:
        caller.greeting.check(bytes(caller.hello))
        if sum(each.inbound is not None or each.is_awaited for each in self._callers) >= self.max_writers:
            raise ProtocolViolation(f"{self.max_writers} writers are here already")
        caller.is_awaited = True
        self.admit(caller)

    def let_in(self, caller: Caller, terms: Terms) -> None:
        """From :meth:`admit`, or later."""
        caller.inbound = Inbound(self._lanes.data, self._lanes.words.num_words, self._lanes.num_lanes)
        caller.is_awaited = False
        caller.heard_at = time.monotonic()
        self._say(caller, caller.greeting.welcome(terms))

    def prepare(self) -> None:
        """Before the thread starts."""

    def admit(self, caller: Caller) -> None:
        """It is known: let it in, now or when all is there that belongs to it."""
        self.let_in(caller, self._terms)

    def dismiss(self, caller: Caller) -> None:
        """Its socket is closed: free its lanes, now or when nothing can come by another way either."""
        self.free_lanes(caller)

    def free_lanes(self, caller: Caller) -> None:
        self._lanes.let_go_all(caller)

    def on_wake(self) -> None:
        """Somebody has written to ``_wake``."""

    def on_end(self) -> None:
        """All are torn down, and the heap is left next."""

    def _apply(self, caller: Caller, frame: Frame | SignalEach) -> None:
        lanes, words = self._lanes, self._lanes.words
        if isinstance(frame, SignalEach):
            lanes.store_each(frame.words, frame.value)
            return
        kind, small, large = frame
        if kind == frames.SIGNAL:
            lanes.store(small, large)
            return
        slot, lane = divmod(small, MAX_LANES)
        if kind == frames.HOLD:
            if lanes.hold(caller, slot, lane):
                caller.told[slot] = lanes.load(words.state(slot))
                answer = frames.head(frames.HELD, small, caller.told[slot])
            else:
                answer = frames.head(frames.BUSY, small)
        elif kind == frames.LET_GO:
            lanes.let_go(caller, slot, lane)
            if not any(held == slot for held, _ in lanes.held_by(caller)):
                caller.told.pop(slot, None)
            answer = frames.head(frames.FREE, small)
        elif kind == frames.READ:
            answer = frames.head(frames.VALUE, small, lanes.load(small))
        elif kind == frames.SYNC:
            answer = frames.head(frames.SYNCED, small)
        else:
            answer = frames.head(frames.BEAT)
        caller.out += answer

    def _tell_states(self, caller: Caller) -> None:
        """A writer that is told of a closed grant stops sending."""
        try:
            for slot, known in caller.told.items():
                state = self._lanes.load(self._lanes.words.state(slot))
                if state != known and caller in self._callers:
                    caller.told[slot] = state
                    self._say(caller, frames.head(frames.STATE, slot, state))
        except ProtocolViolation as error:
            self._refuse(caller, error)

    def _say(self, caller: Caller, some: bytes) -> None:
        caller.out += some
        try:
            sent = caller.socket.send(caller.out) if caller.out else 0
        except BlockingIOError:
            sent = 0
        except OSError:
            self._tear_down(caller)
            return
        del caller.out[:sent]
        if len(caller.out) > _MAX_UNREAD_NBYTES:
            raise ProtocolViolation(f"{len(caller.out)} bytes of answers are not read")
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if caller.out else 0)
        if self._selector.get_key(caller.socket).events != wanted:
            self._selector.modify(caller.socket, wanted, caller)

    def _tear_down_silent(self, now: float) -> None:
        for caller in list(self._callers):
            if now - caller.heard_at > self._silence_s:
                self._tear_down(caller, frames.SILENT)

    def _tear_down(self, caller: Caller, why: int = 0) -> None:
        """The fence: see the module. ``why``: what it is told, if it can be told anything."""
        if caller not in self._callers:
            return
        self._callers.remove(caller)
        self._selector.unregister(caller.socket)
        if why and caller.inbound is not None:
            with contextlib.suppress(OSError):
                caller.socket.send(frames.head(frames.TORN, why))
        caller.socket.close()
        if caller.inbound is not None:
            caller.inbound.drop()
        if lanes := len(self._lanes.held_by(caller)):
            reason = {frames.LEFT: "left", frames.SILENT: "silent", frames.FAULT: "fault"}.get(why, "gone")
            _logger.warning(log.DOOR_TORN, kind=self.kind, peer=caller.peer, reason=reason, lanes=lanes)
        self.dismiss(caller)
