"""A writer's view of a heap on another host, through its door of TCP.

A put is on its way when its call returns: post.py sends it from where it lies. ``let_go`` goes behind it,
and the lane is free, and the source read no more, when the door has said so.

What takes an answer takes as long as the network does: ``attach``, ``hold``, ``read`` of what is not STATE
of a lane that is held, ``poll(wait=True)``. The first two have a deadline. Threads may ask at the same
time, each about lanes of its own: one takes a lane while another one puts through those it holds. A
connection that is lost holds no lane: its puts raise, its signals and what lets go do nothing, also when it
has been closed, and ``is_lost`` says that another one is to be made.
"""

from __future__ import annotations

import itertools
import socket
import time
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from microserve.kvcache.heap.doors.door import Entrance
from microserve.kvcache.heap.doors.tcp import frames
from microserve.kvcache.heap.doors.tcp.greeting import GREETING_NBYTES, WELCOME_NBYTES, Terms, WriterGreeting
from microserve.kvcache.heap.doors.tcp.line import End, Line
from microserve.kvcache.heap.doors.tcp.post import Post
from microserve.kvcache.heap.heap import Copies, PeerHeap
from microserve.kvcache.heap.mapped import require_inside, require_same_kv
from microserve.kvcache.layout import KvLayout
from microserve.kvcache.words import WordLayout
from microserve.protocol.errors import InternalError, TransferFailed
from microserve.protocol.messages.kv.grant import MAX_LANES, HeapAddress

ATTACH_S: Final = 5.0
HOLD_S: Final = 5.0
"""Longest waits for a door."""
_PROBE_S: Final = 0.25


def attach(post: Post, mine: KvLayout, source: memoryview, address: HeapAddress) -> TcpPeerHeap:
    """:class:`TransferFailed` if its owner is gone, out of reach or another one, or if its KV is laid out
    differently."""
    connection, line, terms = connect(mine, address)
    post.add(line, connection)
    return TcpPeerHeap(post, line, terms, address, source)


def connect(mine: KvLayout, address: HeapAddress) -> tuple[socket.socket, Line, Terms]:
    """A connection whose ends know each other; errors as :func:`attach`."""
    host, port, entrance = _where(address)
    deadline = time.monotonic() + ATTACH_S
    try:
        connection = socket.create_connection((host, port), ATTACH_S)
    except ConnectionRefusedError as error:
        raise TransferFailed(f"nobody listens at {host}:{port}: the owner is gone") from error
    except OSError as error:
        raise TransferFailed(f"{host}:{port} is out of reach: {error}") from error
    try:
        terms = _greet(connection, WriterGreeting(address, entrance), deadline)
        require_same_kv(mine, terms.layout)
    except (OSError, EOFError) as error:
        connection.close()
        # It closed without a word, where it was not what the address names.
        what = str(error) or type(error).__name__
        raise TransferFailed(f"the heap at {host}:{port} is out of reach, or another one: {what}") from error
    except BaseException:
        connection.close()
        raise
    return connection, Line(terms.silence_s, time.monotonic()), terms


class TcpPeerHeap(PeerHeap):
    is_far = True
    takes_payloads = True

    def __init__(
        self, post: Post, line: Line, terms: Terms, address: HeapAddress, source: memoryview
    ) -> None:
        self.layout = terms.layout
        self.words = WordLayout(terms.num_slots, terms.layout.num_layers, terms.layout.num_blocks)
        self.address = address
        self._post = post
        self._line = line
        self._source = source
        self._is_closed = False
        self._syncs = itertools.count(1)

    @property
    def is_lost(self) -> bool:
        return self._line.end is not None

    def follow(self, stream: int) -> None:
        """Our data region is written by this process's own code: done when the call returns."""
        self._require_open()

    def put(self, copies: Copies, source_shift: int = 0, target_shift: int = 0) -> None:
        self._require_open()
        require_inside(copies, source_shift, target_shift, len(self._source), self.layout.data_nbytes)
        self._require_line()
        self._send(self._source, copies, source_shift, target_shift)

    def put_payload(self, payload: NDArray[np.uint8], copies: Copies, target_shift: int = 0) -> None:
        self._require_open()
        require_inside(copies, 0, target_shift, payload.size, self.layout.data_nbytes)
        self._require_line()
        self._send(payload.data, copies, 0, target_shift)

    def _send(self, source: memoryview, copies: Copies, source_shift: int, target_shift: int) -> None:
        shifted = (
            (start + source_shift, target + target_shift, nbytes) for start, target, nbytes in copies.copies
        )
        with self._post.using(self._line):
            if self._line.end is None:
                for frame in frames.put_frames(shifted, source):
                    self._line.put(frame)

    def signal(self, word: int, value: int) -> None:
        self._require_open()
        self._tell(frames.head(frames.SIGNAL, word, value))

    def signal_each(self, words: NDArray[np.int64], value: int) -> None:
        self._require_open()
        self._tell(*frames.signal_each_frames(words, value))

    def read(self, word: int) -> int:
        """:class:`TransferFailed` if the connection is lost."""
        self._require_open()
        with self._post.using(self._line):
            for slot, state in self._line.told.items():
                if word == self.words.state(slot):
                    return state
        _, _, value = self._ask(frames.READ, word, frames.VALUE)
        return value

    def hold(self, slot: int, lane: int) -> bool:
        """:class:`TransferFailed` if the connection is lost, or the door does not answer in time."""
        self._require_open()
        index = slot * MAX_LANES + lane
        with self._post.using(self._line):
            if index in self._line.lanes:
                return False
            if self._line.given_up:  # who waited for the last one has waited for all
                raise TransferFailed(f"the door of {self.address.incarnation:#x} still does not answer")
        kind, _, _ = self._ask(frames.HOLD, index, frames.HELD, HOLD_S)
        return kind == frames.HELD

    def let_go(self, slot: int, lane: int) -> None:
        self._require_open()
        index = slot * MAX_LANES + lane
        with self._post.using(self._line):
            if self._line.lanes.get(index):
                self._line.let_go(index)

    def holds(self, slot: int, lane: int) -> bool:
        return slot * MAX_LANES + lane in self._line.lanes

    def poll(self, *, wait: bool = False) -> None:
        self._require_open()
        if wait and self._line.end is None:
            try:
                self._ask(frames.SYNC, next(self._syncs) & 0xFFFFFFFF, frames.SYNCED)
            except TransferFailed:
                return  # nothing of ours is on its way any more

    def leave_source(self) -> None:
        self._require_open()
        self._post.leave_source(self._line)

    @property
    def nbytes_per_s(self) -> float:
        return self._line.nbytes_per_s

    def take_samples(self) -> list[tuple[int, float]]:
        taken: list[tuple[int, float]] = []
        while self._line.samples:
            taken.append(self._line.samples.popleft())
        return taken

    @property
    def is_idle(self) -> bool:
        return not self._line.lanes

    def owner_is_dead(self) -> bool:
        """Where the connection is broken, by a look whether anybody listens there."""
        self._require_open()
        if self._line.end in (End.LEFT, End.CLOSED):
            return True
        if self._line.end is None:
            return False
        host, port, _ = _where(self.address)
        try:
            socket.create_connection((host, port), _PROBE_S).close()
        except ConnectionRefusedError:
            return True
        except OSError:
            pass
        return False

    def close(self) -> None:
        if self._is_closed:
            return
        held = [divmod(index, MAX_LANES) for index, is_ours in self._line.lanes.items() if is_ours]
        if held:
            raise InternalError(f"close: lanes {sorted(held)} are held")
        self.poll(wait=True)
        self._is_closed = True
        self._post.remove(self._line)
        self._source = memoryview(b"")

    def _tell(self, *some: bytes) -> None:
        with self._post.using(self._line):
            if self._line.end is None:
                for frame in some:
                    self._line.put([frame])

    def _ask(
        self, kind: int, small: int, answers: int, timeout_s: float | None = None
    ) -> tuple[int, int, int]:
        line = self._line
        with self._post.using(line):
            self._require_line()
            question = line.ask(kind, small, answers)
        self._post.wait(line, lambda: question.answer is not None, timeout_s)
        if question.answer is None:
            with self._post.using(line):
                line.give_up(question)
            self._require_line()
            raise TransferFailed(
                f"the door of {self.address.incarnation:#x} does not answer for {timeout_s} s"
            )
        return question.answer

    def _require_line(self) -> None:
        if self._line.end is not None:
            owner = f"the heap of {self.address.incarnation:#x}"
            raise TransferFailed(f"the connection to {owner} is lost: {self._line.end.value}")

    def _require_open(self) -> None:
        if self._is_closed and self._line.end is End.OURS:
            raise InternalError(f"the peer heap of {self.address.incarnation:#x} is closed")


def _greet(connection: socket.socket, greeting: WriterGreeting, deadline: float) -> Terms:
    connection.sendall(greeting.hello(_receive(connection, GREETING_NBYTES, deadline)))
    nbytes = greeting.terms_nbytes(_receive(connection, WELCOME_NBYTES, deadline))
    return greeting.terms(_receive(connection, nbytes, deadline))


def _receive(connection: socket.socket, nbytes: int, deadline: float) -> bytes:
    some = bytearray()
    while len(some) < nbytes:
        connection.settimeout(max(0.001, deadline - time.monotonic()))
        more = connection.recv(nbytes - len(some))
        if not more:
            raise EOFError("the connection was closed")
        some += more
    return bytes(some)


def _where(address: HeapAddress) -> tuple[str, int, Entrance]:
    try:
        entrance = msgspec.msgpack.decode(address.door, type=Entrance)
        host, _, port = entrance.where.decode().rpartition(":")
        where = host.removeprefix("[").removesuffix("]"), int(port)
        where[0].encode("idna")  # as who looks the name up does, with an error that is no OSError
    except (msgspec.MsgspecError, ValueError) as error:
        raise TransferFailed(f"the address of a tcp door does not decode: {error}") from error
    if where[1] != address.fd:
        raise TransferFailed(f"the address of a tcp door is of port {where[1]}, and names {address.fd}")
    return *where, entrance
