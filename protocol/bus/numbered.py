"""Numbered messages: a loss on a living connection shows with the next message (WIRE.md 2.5).

Wraps the client and server sockets of any ``Bus``: appends (epoch, number) to the header frame of what goes
out, takes it off what comes in, and tells its owner before it hands over the message that revealed a loss.
Knows frames, not messages, and repeats nothing: whoever lost something ends the connection and begins anew.

A peer whose last message had no number is served as it is, without numbers in either direction.
"""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Callable, Sequence
from enum import Enum
from struct import Struct

from microserve.protocol.bus.transport import Bus, DisconnectHandler, FramesHandler, PeerHandler
from microserve.protocol.security.rights import Entrance, Roles
from microserve.protocol.types import WIRE_VERSION

MAX_NUMBERED_PEERS = 4096
"""Peers of one server whose numbers are kept; beyond it the one that was quiet for longest is forgotten."""

_NUMBER = Struct("<II")
_PLAIN_NBYTES = 2
_NUMBERED_NBYTES = _PLAIN_NBYTES + _NUMBER.size
_FIRST = 1
_MASK = 0xFFFF_FFFF
_HALF = 0x8000_0000

_pack = _NUMBER.pack
_unpack_from = _NUMBER.unpack_from


class Verdict(Enum):
    """What a number says about the messages before it."""

    NEXT = "next"
    DUPLICATE = "duplicate"
    """Handed over before, or given up for lost before: not to be handed over."""
    GAP = "gap"
    """Messages before it were lost."""
    REBORN = "reborn"
    """The first message of another life of the peer; what the old one had under way is lost."""


class Outgoing:
    """Numbers what is sent to one peer."""

    __slots__ = ("_epoch", "_number")

    def __init__(self, epoch: int, number: int = _FIRST) -> None:
        """``epoch``: u32, another for each life; ``number``: of the first message."""
        self._epoch = epoch
        self._number = number

    def stamp(self, header: bytes) -> bytes:
        """Uses the number up, whether or not the message is taken: a refused one must leave a gap."""
        number = self._number
        self._number = number + 1 & _MASK
        return header + _pack(self._epoch, number)


class Incoming:
    """Judges the numbers that come from one peer; they wrap at 2^32, half of them being older."""

    __slots__ = ("_epoch", "_expected")

    def __init__(self) -> None:
        self._epoch: int | None = None
        self._expected = _FIRST

    @property
    def epoch(self) -> int | None:
        """The peer's life; None before its first message."""
        return self._epoch

    def take(self, epoch: int, number: int) -> Verdict:
        if epoch == self._epoch:
            if number == self._expected:
                self._expected = number + 1 & _MASK
                return Verdict.NEXT
            if number - self._expected & _MASK >= _HALF:
                return Verdict.DUPLICATE
            verdict = Verdict.GAP
        elif number != _FIRST:
            verdict = Verdict.GAP
        else:
            verdict = Verdict.NEXT if self._epoch is None else Verdict.REBORN
        self._epoch = epoch
        self._expected = number + 1 & _MASK
        return verdict


def _is_numbered(header: bytes) -> bool:
    return len(header) == _NUMBERED_NBYTES and header[0] == WIRE_VERSION


def new_epoch() -> int:
    return secrets.randbits(32)


class _Peer:
    __slots__ = ("incoming", "outgoing")

    def __init__(self) -> None:
        self.incoming = Incoming()
        # An epoch for each time that we know the peer: should it be forgotten, nothing that it is sent later
        # can pass for an old message.
        self.outgoing = Outgoing(new_epoch())


class NumberedServer:
    """A ``ServerSocket`` that notices losses."""

    def __init__(
        self,
        bus: Bus,
        address: str,
        handler: PeerHandler,
        on_loss: Callable[[bytes], None],
        entrance: Entrance = Entrance.ANY,
    ) -> None:
        """``on_loss`` is called with the peer before the message that revealed the loss is handed over.

        Raises as ``Bus.server``.
        """
        self.num_lost = 0
        """Times that a loss was noticed."""
        self.num_duplicates = 0
        self._handler = handler
        self._on_loss = on_loss
        self._peers: OrderedDict[bytes, _Peer] = OrderedDict()
        """Those that number their messages, the most recently heard last."""
        self._closed = False
        self._socket = bus.server(address, self._receive, entrance)

    @property
    def address(self) -> str:
        return self._socket.address

    @property
    def sender_roles(self) -> Roles:
        """What the sender of the message that is being handled may be."""
        return self._socket.sender_roles

    def send(self, peer: bytes, frames: Sequence[bytes]) -> bool:
        """False when the peer is gone or its queue is full; then its next message reveals the loss."""
        known = self._peers.get(peer)
        if known is None:
            return self._socket.send(peer, frames)
        return self._socket.send(peer, [known.outgoing.stamp(frames[0]), *frames[1:]])

    def close(self) -> None:
        self._closed = True
        self._socket.close()

    def _receive(self, peer: bytes, frames: list[bytes]) -> None:
        if not frames or not _is_numbered(frames[0]):
            self._peers.pop(peer, None)
            self._handler(peer, frames)
            return
        header = frames[0]
        epoch, number = _unpack_from(header, _PLAIN_NBYTES)
        known = self._peers.get(peer)
        if known is None:
            known = self._admit(peer)
        else:
            self._peers.move_to_end(peer)
        is_new_life = known.incoming.epoch not in (None, epoch)
        verdict = known.incoming.take(epoch, number)
        if verdict is Verdict.DUPLICATE:
            self.num_duplicates += 1
            return
        if is_new_life:
            known.outgoing = Outgoing(new_epoch())
        if verdict is Verdict.GAP:
            self.num_lost += 1
            self._on_loss(peer)
            if self._closed:
                return
        self._handler(peer, [header[:_PLAIN_NBYTES], *frames[1:]])

    def _admit(self, peer: bytes) -> _Peer:
        if len(self._peers) >= MAX_NUMBERED_PEERS:
            self._peers.popitem(last=False)
        known = self._peers[peer] = _Peer()
        return known


class NumberedClient:
    """A ``ClientSocket`` that notices losses, and a server that is another life of the one that it was."""

    def __init__(
        self,
        bus: Bus,
        address: str,
        handler: FramesHandler,
        on_loss: Callable[[str], None],
        *,
        server_key: str = "",
        on_disconnect: DisconnectHandler | None = None,
    ) -> None:
        """``on_loss`` is called with what happened, in words, before the message that revealed it is handed
        over; if it closes the socket, that message is dropped. Raises as ``Bus.client``."""
        self.num_duplicates = 0
        self._handler = handler
        self._on_loss = on_loss
        self._incoming = Incoming()
        self._outgoing = Outgoing(new_epoch())
        self._closed = False
        self._socket = bus.client(address, self._receive, server_key=server_key, on_disconnect=on_disconnect)

    def send(self, frames: Sequence[bytes]) -> bool:
        """False when the queue is full; then the next message reveals the loss to the server."""
        return self._socket.send([self._outgoing.stamp(frames[0]), *frames[1:]])

    def close(self) -> None:
        self._closed = True
        self._socket.close()

    def _receive(self, frames: list[bytes]) -> None:
        if not frames or not _is_numbered(frames[0]):
            self._handler(frames)
            return
        header = frames[0]
        verdict = self._incoming.take(*_unpack_from(header, _PLAIN_NBYTES))
        if verdict is not Verdict.NEXT:
            if verdict is Verdict.DUPLICATE:
                self.num_duplicates += 1
                return
            is_reborn = verdict is Verdict.REBORN
            self._on_loss("the peer is another life of it" if is_reborn else "messages were lost")
            if self._closed:
                return
        self._handler([header[:_PLAIN_NBYTES], *frames[1:]])
