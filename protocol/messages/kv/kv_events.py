"""KV events: what an engine's prefix cache gained and lost, on vLLM's wire format (WIRE.md 7).

    PUB      [topic][seq u64 BE][payload]
    request  [""][start seq u64 BE]                          a DEALER to the replay ROUTER
    answer   [identity][""][topic][seq u64 BE][payload] ...  then the end marker: seq ff*8, empty payload
    payload  msgpack array [ts, [event, ...], data_parallel_rank]
    event    msgpack map, key "type" = BlockStored | BlockRemoved | AllBlocksCleared

We send this form only; ``kv_decoding.py`` reads it and what others send. Other people's readers take three
items and names of 64 bits and no others, but skip keys that they do not know. So what is ours stands in such
keys: the incarnation of the engine in a batch's first event (``epoch``), so that a restart cannot be taken
for a continuation; and of each name of 16 bytes the first 8 (``name_heads``), while the last 8 go as an int.
Our own readers put both halves together: a name is as wide for them as it ever was.

Owns bytes and frames. Does not know what a hash means (kvcache/prefix/index.py) nor any socket.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple, cast

import msgspec

from microserve.protocol.errors import InternalError, ProtocolViolation
from microserve.protocol.types import MAX_BULK_NBYTES, Buffer

WireHash = int | Annotated[bytes, msgspec.Meta(max_length=64)]
"""16 bytes from our engines (kvcache/prefix/hash.py), once they are read; 64-bit ints or digests from others:
opaque names."""

TokenId = Annotated[int, msgspec.Meta(ge=0, le=0xFFFF_FFFF)]
ExtraKeys = list[tuple[Any, ...] | None]

DEVICE_MEDIUMS = (None, "GPU")
"""Media whose blocks an engine can attend to at once; others are offload tiers."""

PREFIX_KINDS = ("full_attention", "mla_attention", "sink_full_attention")
"""Kinds of cache groups that keep whole prefixes: a sliding window or a state of a recurrence is none."""

MAX_PAYLOAD_NBYTES = MAX_BULK_NBYTES
MAX_SEQ = 2**63 - 1
NAME_NBYTES = 16
"""Of a name that is ours: on the wire two u64, big-endian, the first in ``name_heads``."""
_SEQ_NBYTES = 8
_END_SEQ = b"\xff" * _SEQ_NBYTES


def _null() -> None:
    """Default of a key that is sent even when it is null: vLLM's readers require it to be there."""


class _Event(msgspec.Struct, tag_field="type", omit_defaults=True, gc=False):
    """``epoch`` and ``name_heads`` are there on the wire only: a batch that was read has them in its own
    ``epoch`` and in the names."""


class BlockStored(_Event, tag="BlockStored", gc=False):
    """A run of consecutive blocks; ``token_ids`` holds the tokens of all of them.

    ``parent_block_hash`` is the hash before the run, None at the start of a sequence."""

    block_hashes: list[WireHash]
    parent_block_hash: WireHash | None
    token_ids: list[TokenId]
    block_size: int
    lora_id: int | None = msgspec.field(default_factory=_null)
    medium: str | None = msgspec.field(default_factory=_null)
    lora_name: str | None = msgspec.field(default_factory=_null)
    extra_keys: ExtraKeys | None = None
    """One entry per block: what its hash depends on besides tokens. From us: ``(salt,)`` on the first block
    of a salted sequence."""
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: int | None = None
    locality: str | None = None
    cache_salt: str | None = None
    """SGLang's: the salt of the whole sequence, in each of its events."""
    name_heads: bytes | None = None
    epoch: int | None = None


class BlockRemoved(_Event, tag="BlockRemoved", gc=False):
    block_hashes: list[WireHash]
    medium: str | None = msgspec.field(default_factory=_null)
    group_idx: int | None = None
    locality: str | None = None
    name_heads: bytes | None = None
    epoch: int | None = None


class AllBlocksCleared(_Event, tag="AllBlocksCleared", gc=False):
    """Everything that was stored is gone."""

    epoch: int | None = None


KVEvent = BlockStored | BlockRemoved | AllBlocksCleared


class WireBatch(msgspec.Struct, array_like=True, gc=False):
    """``KVEventBatch`` of vLLM and SGLang, as it is on the wire."""

    ts: float
    """Wall clock of the sender in seconds; for people, never for order."""
    events: list[KVEvent]
    data_parallel_rank: int | None = None


class KVEventBatch(msgspec.Struct, gc=False):
    """A batch as it is to be sent, or as it was read."""

    ts: float
    events: list[KVEvent]
    data_parallel_rank: int | None = None
    epoch: int | None = None
    """Incarnation of the engine; None from engines that are not ours. Travels in the first event."""
    num_skipped: int = 0
    """Events that were read and are none of ours: of an unknown type."""


_ENCODER = msgspec.msgpack.Encoder()


def encode_batch(batch: KVEventBatch, *, strict: bool = False) -> bytes:
    """The payload; every name of 16 bytes as an int and its head. ``strict``: without heads and epoch, in
    vLLM's keys alone, for readers that refuse others."""
    events = [_on_wire(event, strict=strict) for event in batch.events]
    if events and batch.epoch is not None and not strict:
        events[0] = msgspec.structs.replace(events[0], epoch=batch.epoch)
    return _ENCODER.encode(WireBatch(batch.ts, events, batch.data_parallel_rank))


def _on_wire(event: KVEvent, *, strict: bool) -> KVEvent:
    if isinstance(event, AllBlocksCleared):
        return event
    names = named_by(event)
    if not names or not all(type(name) is bytes and len(name) == NAME_NBYTES for name in names):
        return event
    halves = struct.unpack(f">{2 * len(names)}Q", b"".join(cast("list[bytes]", names)))
    heads = None if strict else struct.pack(f">{len(names)}Q", *halves[::2])
    return renamed(event, list(halves[1::2]), heads)


def named_by(event: BlockStored | BlockRemoved) -> list[WireHash]:
    """Every name in it, that of the parent first if there is one."""
    if isinstance(event, BlockStored) and event.parent_block_hash is not None:
        return [event.parent_block_hash, *event.block_hashes]
    return event.block_hashes


def renamed(event: KVEvent, names: list[WireHash], heads: bytes | None) -> KVEvent:
    """A copy with these names, as many as :func:`named_by` gives."""
    if not isinstance(event, BlockStored):
        return msgspec.structs.replace(event, block_hashes=names, name_heads=heads)
    parent = None if event.parent_block_hash is None else names[0]
    hashes = names if parent is None else names[1:]
    return msgspec.structs.replace(event, block_hashes=hashes, parent_block_hash=parent, name_heads=heads)


# --- frames ------------------------------------------------------------------------------------------


class Published(NamedTuple):
    topic: str
    seq: int
    payload: bytes
    """For :func:`decode_batch`."""


def publish_frames(topic: str, seq: int, payload: bytes) -> list[bytes]:
    """Frames of one batch for the PUB socket; ``seq`` is 0 to ``MAX_SEQ`` and grows by one."""
    return [topic.encode(), _pack_seq(seq), payload]


def parse_published(frames: Sequence[Buffer]) -> Published:
    """What a SUB socket received. Raises :class:`ProtocolViolation`."""
    if len(frames) != 3:
        raise ProtocolViolation(f"KV events in {len(frames)} frames, expected 3")
    topic, seq, payload = frames
    return Published(_parse_topic(topic), _parse_seq(seq), bytes(payload))


def replay_request(start_seq: int) -> list[bytes]:
    """Asks for every batch from ``start_seq`` on that the engine still has; sent by a DEALER."""
    return [b"", _pack_seq(start_seq)]


def parse_replay_request(frames: Sequence[Buffer]) -> tuple[bytes, int]:
    """Identity and start sequence of what the ROUTER received. Raises :class:`ProtocolViolation`."""
    if len(frames) != 3 or not frames[0] or frames[1]:
        raise ProtocolViolation(f"replay request in {len(frames)} frames, expected identity, empty, sequence")
    return bytes(frames[0]), _parse_seq(frames[2])


def replay_answer(identity: bytes, topic: str, seq: int, payload: bytes) -> list[bytes]:
    """One batch for the peer that asked; sent by the ROUTER."""
    return [identity, b"", topic.encode(), _pack_seq(seq), payload]


def replay_end(identity: bytes) -> list[bytes]:
    """Nothing more follows."""
    return [identity, b"", b"", _END_SEQ, b""]


def parse_replay_answer(frames: Sequence[Buffer]) -> Published | None:
    """One answer, or None for the end marker. Raises :class:`ProtocolViolation`.

    Takes the frames as a ROUTER sent them (5, or 4 from engines that send no topic), as a DEALER sees them
    (identity gone) and as a REQ does (delimiter gone too). Counted from the back they differ only in
    whether a topic stands before the sequence; where that cannot be told, it is empty.
    """
    if not 2 <= len(frames) <= 5:
        raise ProtocolViolation(f"replay answer in {len(frames)} frames, expected 2 to 5")
    *envelope, seq, payload = frames
    topic: Buffer = b""
    match len(envelope):
        case 1:  # [topic] for a REQ, or [""] for a DEALER when no topic is sent: an empty topic both times
            topic = envelope[0]
        case 2 if not envelope[0]:  # ["", topic]
            topic = envelope[1]
        case 2 if envelope[1]:  # neither ["", topic] nor [identity, ""]
            raise ProtocolViolation("replay answer without its empty delimiter")
        case 3:
            if envelope[1] or not envelope[0]:
                raise ProtocolViolation("replay answer without its empty delimiter")
            topic = envelope[2]
    if bytes(seq) == _END_SEQ:
        return None
    return Published(_parse_topic(topic), _parse_seq(seq), bytes(payload))


def _pack_seq(seq: int) -> bytes:
    if not 0 <= seq <= MAX_SEQ:
        raise InternalError(f"sequence {seq} is outside 0 to {MAX_SEQ}")
    return seq.to_bytes(_SEQ_NBYTES, "big")


def _parse_seq(frame: Buffer) -> int:
    if len(frame) != _SEQ_NBYTES:
        raise ProtocolViolation(f"sequence of {len(frame)} bytes, expected {_SEQ_NBYTES}")
    seq = int.from_bytes(frame, "big")
    if seq > MAX_SEQ:
        raise ProtocolViolation(f"sequence {seq}, limit {MAX_SEQ}")
    return seq


def _parse_topic(frame: Buffer) -> str:
    try:
        return bytes(frame).decode()
    except UnicodeDecodeError:
        raise ProtocolViolation("topic is not UTF-8") from None
