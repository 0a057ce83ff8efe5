"""Frames <-> messages: one typed decoder per direction; decoding is validating (WIRE.md 2, 3).

    frame 0   header    version (u8), channel (u8)
    frame 1   message   msgpack array, first element the message's tag in its channel
    frame 2+  bulk      raw bytes, only where the message's section in WIRE.md says so

Knows nothing of sockets; a ROUTER's envelope frame is taken off before and put on after.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from enum import IntEnum
from typing import Any, Generic, TypeVar

import msgspec

from microserve.protocol.errors import InternalError, PromptTooLong, ProtocolViolation
from microserve.protocol.messages import engine as actions
from microserve.protocol.messages import index as membership
from microserve.protocol.messages import router as serving
from microserve.protocol.types import (
    MAX_BULK_NBYTES,
    MAX_PROMPT_TOKENS,
    MAX_REQUEST_FRAME_NBYTES,
    WIRE_VERSION,
    Buffer,
)

MAX_MESSAGE_NBYTES = 8 << 20
"""Longest message frame; anything longer is dropped before it is parsed."""
MAX_BULK_FRAMES = 4

Frames = list[bytes]
T = TypeVar("T")


class Channel(IntEnum):
    """Direction of a message; numbers are append-only."""

    ROUTER_TO_ENGINE = 1
    ENGINE_TO_ROUTER = 2
    GATEWAY_TO_ROUTER = 3
    ROUTER_TO_GATEWAY = 4
    TO_INDEX = 5
    FROM_INDEX = 6


class Codec(Generic[T]):
    """Encodes and decodes the union of one channel."""

    def __init__(self, channel: Channel, union: Any, max_frame_nbytes: int = MAX_BULK_NBYTES) -> None:
        """``max_frame_nbytes``: what the sockets of that direction take."""
        self.channel = channel
        self._max_frame_nbytes = max_frame_nbytes
        self._header = bytes((WIRE_VERSION, channel))
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(union)

    def encode(self, message: T, *bulk: bytes) -> Frames:
        """Raises :class:`PromptTooLong` for a prompt, and :class:`InternalError` for other bulk, that no peer
        would take: it would cost the connection."""
        if bulk and max(map(len, bulk)) > self._max_frame_nbytes:
            raise PromptTooLong(
                f"a prompt has at most {MAX_PROMPT_TOKENS} tokens, not {max(map(len, bulk)) // 4}"
            )
        if bulk and (len(bulk) > MAX_BULK_FRAMES or sum(map(len, bulk)) > MAX_BULK_NBYTES):
            raise InternalError(
                f"{len(bulk)} bulk frames of {sum(map(len, bulk))} bytes, "
                f"limits {MAX_BULK_FRAMES} and {MAX_BULK_NBYTES}"
            )
        return [self._header, self._encoder.encode(message), *bulk]

    def decode(self, frames: Sequence[Buffer]) -> tuple[T, list[bytes]]:
        """Message and bulk frames. Raises :class:`ProtocolViolation` on anything that WIRE.md forbids."""
        if not 2 <= len(frames) <= 2 + MAX_BULK_FRAMES:
            raise ProtocolViolation(f"{len(frames)} frames, expected 2 to {2 + MAX_BULK_FRAMES}")
        header = bytes(frames[0])
        if header != self._header:
            raise self._wrong(header)
        if len(frames[1]) > MAX_MESSAGE_NBYTES:
            raise ProtocolViolation(f"message of {len(frames[1])} bytes, limit {MAX_MESSAGE_NBYTES}")
        bulk: list[bytes] = []
        if len(frames) > 2:
            bulk = [bytes(frame) for frame in frames[2:]]
            if sum(map(len, bulk)) > MAX_BULK_NBYTES:
                raise ProtocolViolation(f"bulk of {sum(map(len, bulk))} bytes, limit {MAX_BULK_NBYTES}")
        try:
            return self._decoder.decode(frames[1]), bulk
        except (msgspec.MsgspecError, RecursionError, OverflowError, UnicodeDecodeError) as error:
            raise ProtocolViolation(f"{self.channel.name}: {error}") from None

    def _wrong(self, header: bytes) -> ProtocolViolation:
        if header and header[0] != WIRE_VERSION:  # first: its header may have another length, or a number
            return ProtocolViolation(f"wire version {header[0]}, expected {WIRE_VERSION}")
        if len(header) != len(self._header):
            return ProtocolViolation(f"header of {len(header)} bytes, expected {len(self._header)}")
        return ProtocolViolation(f"channel {header[1]}, expected {self.channel:d} ({self.channel.name})")


ENGINE_REQUEST: Codec[actions.EngineRequest] = Codec(
    Channel.ROUTER_TO_ENGINE, actions.EngineRequest, MAX_REQUEST_FRAME_NBYTES
)
ENGINE_REPLY: Codec[actions.EngineReply] = Codec(Channel.ENGINE_TO_ROUTER, actions.EngineReply)
ROUTER_REQUEST: Codec[serving.RouterRequest] = Codec(
    Channel.GATEWAY_TO_ROUTER, serving.RouterRequest, MAX_REQUEST_FRAME_NBYTES
)
ROUTER_REPLY: Codec[serving.RouterReply] = Codec(Channel.ROUTER_TO_GATEWAY, serving.RouterReply)
INDEX_REQUEST: Codec[membership.IndexRequest] = Codec(
    Channel.TO_INDEX, membership.IndexRequest, MAX_REQUEST_FRAME_NBYTES
)
INDEX_REPLY: Codec[membership.IndexReply] = Codec(Channel.FROM_INDEX, membership.IndexReply)


def encode_tokens(tokens: Sequence[int]) -> bytes:
    """Token ids as raw little-endian u32. Raises ``OverflowError`` for an id outside 32 bits."""
    data = array("I", tokens)
    if sys.byteorder == "big":
        data.byteswap()
    return data.tobytes()


def decode_tokens(data: Buffer) -> list[int]:
    """The inverse; raises :class:`ProtocolViolation` when the length is not a multiple of four."""
    if len(data) % 4:
        raise ProtocolViolation(f"token frame of {len(data)} bytes is not a multiple of 4")
    tokens = array("I")
    tokens.frombytes(data)
    if sys.byteorder == "big":
        tokens.byteswap()
    return tokens.tolist()
