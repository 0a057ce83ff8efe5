"""How the two ends of a connection know each other before a byte of KV moves; sans-I/O.

    owner   MAGIC, a nonce                                        as soon as somebody connects
    writer  MAGIC, a nonce, proof of the secret over both nonces and the address that it was given
    owner   proof of the same secret, and what the heap is like; or it closes, and says nothing

The secret itself never goes over the connection. The address is part of the proof: whoever means another
heap, of a process that had this port before, say, is refused, and whoever listens here now and is not that
heap cannot answer. What follows is neither encrypted nor signed: a network on which others may write into
foreign connections is none for a door (docs/operations.md).
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import struct
from typing import Final

import msgspec

from microserve.kvcache.heap.doors.door import Entrance
from microserve.kvcache.layout import KvLayout
from microserve.protocol.errors import ConfigError, ProtocolViolation, TransferFailed
from microserve.protocol.messages.kv.grant import HeapAddress

MAGIC: Final = b"MSKVTCP1"
NONCE_NBYTES: Final = 16
_PROOF_NBYTES: Final = 32
GREETING_NBYTES: Final = len(MAGIC) + NONCE_NBYTES
HELLO_NBYTES: Final = len(MAGIC) + NONCE_NBYTES + _PROOF_NBYTES
_LENGTH: Final = struct.Struct("<I")
WELCOME_NBYTES: Final = _PROOF_NBYTES + _LENGTH.size
MAX_TERMS_NBYTES: Final = 1 << 14


class Terms(msgspec.Struct, frozen=True, array_like=True):
    """What a writer must know of a heap."""

    layout: KvLayout
    num_slots: int
    silence_s: float
    """Nothing heard for so long: torn down, by either end."""
    agent: bytes = b""
    """Where KV goes by another way than this connection: metadata of an agent of NIXL, for this writer
    alone."""
    base: int = 0
    """Address of the data region, as that agent knows it."""


class OwnerGreeting:
    """One connection, from the owner's end."""

    def __init__(self, address: HeapAddress, secret: bytes) -> None:
        self._identity, self._secret = _identity(address), secret
        self._nonce = secrets.token_bytes(NONCE_NBYTES)
        self._nonces = b""

    @property
    def greeting(self) -> bytes:
        return MAGIC + self._nonce

    def check(self, hello: bytes) -> None:
        """``HELLO_NBYTES`` bytes. :class:`ProtocolViolation` for a stranger: close."""
        magic, nonce, proof = hello[:8], hello[8 : 8 + NONCE_NBYTES], hello[8 + NONCE_NBYTES :]
        self._nonces = self._nonce + nonce
        is_known = hmac.compare_digest(_proof(self._secret, b"writer", self._nonces, self._identity), proof)
        if magic != MAGIC or not is_known:
            raise ProtocolViolation("a stranger at the door")

    def welcome(self, terms: Terms) -> bytes:
        """The answer to one who is known."""
        packed = msgspec.msgpack.encode(terms)
        mine = _proof(self._secret, b"owner", self._nonces, self._identity)
        return mine + _LENGTH.pack(len(packed)) + packed


class WriterGreeting:
    """One connection, from the writer's end. What it raises is :class:`TransferFailed`."""

    def __init__(self, address: HeapAddress, entrance: Entrance) -> None:
        self._address, self._secret = address, entrance.secret
        self._nonces = b""

    def hello(self, greeting: bytes) -> bytes:
        if greeting[:8] != MAGIC:
            raise TransferFailed(
                f"whoever listens for {self._address.incarnation:#x} is no door of this version"
            )
        nonce = secrets.token_bytes(NONCE_NBYTES)
        self._nonces = greeting[8:] + nonce
        return MAGIC + nonce + _proof(self._secret, b"writer", self._nonces, _identity(self._address))

    def terms_nbytes(self, welcome: bytes) -> int:
        """How much follows ``WELCOME_NBYTES`` bytes."""
        proof, (length,) = welcome[:_PROOF_NBYTES], _LENGTH.unpack(welcome[_PROOF_NBYTES:])
        expected = _proof(self._secret, b"owner", self._nonces, _identity(self._address))
        if not hmac.compare_digest(expected, proof) or length > MAX_TERMS_NBYTES:
            raise TransferFailed(
                f"whoever listens for {self._address.incarnation:#x} does not know its secret"
            )
        return int(length)

    def terms(self, packed: bytes) -> Terms:
        try:
            return msgspec.msgpack.decode(packed, type=Terms)
        except (msgspec.MsgspecError, ConfigError) as error:
            raise TransferFailed(f"the door's terms do not decode: {error}") from error


def _identity(address: HeapAddress) -> bytes:
    """All of the address but what is known at its door alone."""
    return msgspec.msgpack.encode(msgspec.structs.replace(address, door=b""))


def _proof(secret: bytes, side: bytes, nonces: bytes, identity: bytes) -> bytes:
    return hmac.digest(secret, b"microserve door " + side + nonces + identity, hashlib.sha256)
