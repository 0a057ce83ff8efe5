"""What each connection to our sockets holds of our memory, and which have to go: sans-I/O.

libzmq bounds a frame and a number of whole messages, and nothing else: of a message that is never finished it
keeps every frame, from peers who have shown no key yet too. What is bounded here is what has come by a
connection and was not handed over: bytes that the kernel has received, less those of messages that were
handled.

    first        by a connection that has not said one whole message
    unfinished   although the socket was read empty since: parts of one message
    queued       whatever it is
    strangers    of all connections of the first kind together: the one that holds most goes first
    total        of all connections together, likewise
    number       of connections to one socket: the oldest that has said nothing goes first

Owns the account and the verdicts. Knows no socket; readings come in, descriptors that must be closed go out.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import Any

KIB, MIB = 1 << 10, 1 << 20


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one socket. Bytes on the wire, by connection."""

    frame_nbytes: int
    """Longest frame that it takes (``ZMQ_MAXMSGSIZE``)."""
    first_nbytes: int
    unfinished_nbytes: int
    queued_nbytes: int
    num_connections: int = 4096


@dataclass(slots=True)
class Gate:
    """One of our sockets, as the account needs it."""

    name: str
    limits: Limits
    num_drained: int = 0
    """Grows each time that the socket was found empty; written by the thread that reads it."""


@dataclass(slots=True)
class Connection:
    gate: Gate
    peer: Any
    """Its address, from the kernel: a descriptor's number alone may be somebody else's by now."""
    before: tuple[int, int] = (0, 0)
    """Received at the two readings before the last: what libzmq has not even read is no message's part."""
    received: int = 0
    """At the last reading, as all below."""
    handed: int = 0
    num_drained: int = 0
    base: int = 0
    """Received and handed over when the account was last known to be even."""
    base_handed: int = 0
    held: int = 0

    @property
    def is_stranger(self) -> bool:
        """Not one whole message has come by it."""
        return not self.handed


@dataclass(frozen=True, slots=True)
class Verdict:
    """A connection that has to go."""

    descriptor: int
    peer: Any
    gate: str
    why: str
    held_nbytes: int


@dataclass(slots=True)
class Connections:
    """All of a process, by descriptor."""

    max_strangers_nbytes: int = 16 * MIB
    max_total_nbytes: int = 512 * MIB
    _open: dict[int, Connection] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._open)

    def __iter__(self) -> Any:
        return iter(self._open)

    def of(self, gate: Gate) -> list[Verdict]:
        """All connections of one socket, as if they had to go."""
        return [self._judged(fd, "revoked") for fd, each in self._open.items() if each.gate is gate]

    def find(self, descriptor: int) -> Verdict | None:
        return self._judged(descriptor, "revoked") if descriptor in self._open else None

    def opened(self, descriptor: int, gate: Gate, peer: Any) -> Verdict | None:
        """Count one more, of which nothing was handed over before; returns the one that has to go for it."""
        self._open.pop(descriptor, None)
        self._open[descriptor] = Connection(gate, peer, num_drained=gate.num_drained)
        mine = [fd for fd, each in self._open.items() if each.gate is gate]
        if len(mine) <= gate.limits.num_connections:
            return None
        silent = (fd for fd in mine if self._open[fd].is_stranger)
        return self._judged(next(silent, descriptor), "number")

    def closed(self, descriptor: int) -> None:
        self._open.pop(descriptor, None)

    def judge(self, received: Mapping[int, int], handed: Mapping[int, int]) -> list[Verdict]:
        """Take readings by descriptor: bytes that the kernel has received, bytes of messages handed over."""
        verdicts = []
        for descriptor, nbytes in received.items():
            connection = self._open.get(descriptor)
            if connection is not None and (why := _look(connection, nbytes, handed.get(descriptor, 0))):
                verdicts.append(self._judged(descriptor, why))
        left = self._open.keys() - {each.descriptor for each in verdicts}
        strangers = {fd for fd in left if self._open[fd].is_stranger}
        verdicts += self._beyond(strangers, self.max_strangers_nbytes, "strangers")
        left -= {each.descriptor for each in verdicts}
        return verdicts + self._beyond(left, self.max_total_nbytes, "total")

    def _beyond(self, some: Set[int], max_nbytes: int, why: str) -> list[Verdict]:
        """Those that have to go for the rest of them to hold no more than that together."""
        verdicts = []
        held = sum(self._open[fd].held for fd in some)
        for descriptor in sorted(some, key=lambda fd: -self._open[fd].held) if held > max_nbytes else ():
            if held <= max_nbytes:
                break
            held -= self._open[descriptor].held
            verdicts.append(self._judged(descriptor, why))
        return verdicts

    def _judged(self, descriptor: int, why: str) -> Verdict:
        connection = self._open[descriptor]
        return Verdict(descriptor, connection.peer, connection.gate.name, why, connection.held)


def _look(connection: Connection, received: int, handed: int) -> str:
    """Why it has to go; empty if it may stay.

    What was handed over is counted without the framing, so the account drifts; it is made even whenever it is
    known to be: a message came by it, and the socket was read empty, since the last reading. Who sends a
    message without an end completes no other, so that cannot happen to him more than once."""
    limits, gate = connection.gate.limits, connection.gate
    was_drained = gate.num_drained != connection.num_drained
    if was_drained and handed != connection.handed:
        connection.base, connection.base_handed = connection.received, handed
    owed = connection.base + handed - connection.base_handed
    unfinished = connection.before[0] - owed if was_drained else 0
    connection.held = max(0, received - owed)
    connection.before = (connection.before[1], connection.received)
    connection.received, connection.handed, connection.num_drained = received, handed, gate.num_drained
    if connection.is_stranger and connection.held > limits.first_nbytes:
        return "first"
    if unfinished > limits.unfinished_nbytes:
        return "unfinished"
    return "queued" if connection.held > limits.queued_nbytes else ""
