"""KV events: what an engine's prefix cache gained and lost, on vLLM's wire format (WIRE.md 7).

    PUB      [topic][seq u64 BE][payload]
    request  [""][start seq u64 BE]                          a DEALER to the replay ROUTER
    answer   [identity][""][topic][seq u64 BE][payload] ...  then the end marker: seq ff*8, empty payload
    payload  msgpack array [ts, [event, ...], data_parallel_rank, epoch]
    event    msgpack map, key "type" = BlockStored | BlockRemoved | AllBlocksCleared

We send this form only. We read it and what others send: the batch as a map (newer vLLM), events as
positional arrays (vLLM before June 2026, SGLang), replay answers without a topic. ``epoch`` is ours: the
incarnation of the engine, so that a restart cannot be taken for a continuation.

Owns bytes and frames. Does not know what a hash means (kvcache/prefix/index.py) nor any socket.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import msgspec

from microserve.protocol.errors import InternalError, ProtocolViolation
from microserve.protocol.types import MAX_BULK_NBYTES, Buffer

WireHash = int | Annotated[bytes, msgspec.Meta(max_length=64)]
"""16 bytes from our engines (kvcache/prefix/hash.py); 64-bit ints or digests from others: opaque names."""

TokenId = Annotated[int, msgspec.Meta(ge=0, le=0xFFFF_FFFF)]
ExtraKeys = list[tuple[Any, ...] | None]

DEVICE_MEDIUMS = (None, "GPU")
"""Media whose blocks an engine can attend to at once; others are offload tiers."""

MAX_PAYLOAD_NBYTES = MAX_BULK_NBYTES
MAX_SEQ = 2**63 - 1
_SEQ_NBYTES = 8
_END_SEQ = b"\xff" * _SEQ_NBYTES


def _null() -> None:
    """Default of a key that is sent even when it is null: vLLM's readers require it to be there."""


class _Event(msgspec.Struct, tag_field="type", omit_defaults=True, gc=False):
    pass


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


class BlockRemoved(_Event, tag="BlockRemoved", gc=False):
    block_hashes: list[WireHash]
    medium: str | None = msgspec.field(default_factory=_null)
    group_idx: int | None = None
    locality: str | None = None


class AllBlocksCleared(_Event, tag="AllBlocksCleared", gc=False):
    """Everything that was stored is gone."""


KVEvent = BlockStored | BlockRemoved | AllBlocksCleared


class KVEventBatch(msgspec.Struct, array_like=True, gc=False):
    ts: float
    """Wall clock of the sender in seconds; for people, never for order."""
    events: list[KVEvent]
    data_parallel_rank: int | None = None
    epoch: int | None = None
    """Incarnation of the engine; None from engines that are not ours."""


# --- other people's forms, read only -----------------------------------------------------------------


class _MapBatch(msgspec.Struct):
    ts: float
    events: list[KVEvent]
    data_parallel_rank: int | None = None
    attn_dp_rank: int | None = None
    epoch: int | None = None


class _StoredArray(msgspec.Struct, array_like=True, tag="BlockStored", gc=False):
    block_hashes: list[WireHash]
    parent_block_hash: WireHash | None
    token_ids: list[TokenId]
    block_size: int
    lora_id: int | None = None
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: ExtraKeys | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: int | None = None
    locality: str | None = None

    def event(self) -> BlockStored:
        return BlockStored(**msgspec.structs.asdict(self))


class _RemovedArray(msgspec.Struct, array_like=True, tag="BlockRemoved", gc=False):
    block_hashes: list[WireHash]
    medium: str | None = None
    group_idx: int | None = None
    locality: str | None = None

    def event(self) -> BlockRemoved:
        return BlockRemoved(**msgspec.structs.asdict(self))


class _ClearedArray(msgspec.Struct, array_like=True, tag="AllBlocksCleared", gc=False):
    def event(self) -> AllBlocksCleared:
        return AllBlocksCleared()


class _BatchOfArrays(msgspec.Struct, array_like=True):
    """The third item is ``data_parallel_rank`` in vLLM and ``attn_dp_rank`` in SGLang."""

    ts: float
    events: list[_StoredArray | _RemovedArray | _ClearedArray]
    data_parallel_rank: int | None = None


_ENCODER = msgspec.msgpack.Encoder()
_BATCH = msgspec.msgpack.Decoder(KVEventBatch)
_MAP_BATCH = msgspec.msgpack.Decoder(_MapBatch)
_BATCH_OF_ARRAYS = msgspec.msgpack.Decoder(_BatchOfArrays)


def encode_batch(batch: KVEventBatch) -> bytes:
    return _ENCODER.encode(batch)


def decode_batch(data: Buffer) -> KVEventBatch:
    """A payload in any of the forms above. Raises :class:`ProtocolViolation` for anything else.

    Tokens are u32. Whether the number of tokens fits the number of blocks is left to the reader: some
    engines announce offloaded blocks without tokens."""
    if not 0 < len(data) <= MAX_PAYLOAD_NBYTES:
        raise ProtocolViolation(f"KV events of {len(data)} bytes, expected 1 to {MAX_PAYLOAD_NBYTES}")
    try:
        if _is_map(data[0]):
            batch = _MAP_BATCH.decode(data)
            rank = batch.attn_dp_rank if batch.data_parallel_rank is None else batch.data_parallel_rank
            return KVEventBatch(batch.ts, batch.events, rank, batch.epoch)
        try:
            return _BATCH.decode(data)
        except msgspec.ValidationError as error:
            return _decode_arrays(data, error)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise ProtocolViolation(f"KV events: {error}") from None


def _decode_arrays(data: Buffer, not_maps: msgspec.ValidationError) -> KVEventBatch:
    try:
        batch = _BATCH_OF_ARRAYS.decode(data)
    except msgspec.ValidationError as not_arrays:
        raise ProtocolViolation(f"KV events: as maps: {not_maps}; as arrays: {not_arrays}") from None
    return KVEventBatch(batch.ts, [event.event() for event in batch.events], batch.data_parallel_rank)


def _is_map(first: int) -> bool:
    return 0x80 <= first <= 0x8F or first in (0xDE, 0xDF)  # fixmap, map 16, map 32


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
