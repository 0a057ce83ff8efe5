"""Payloads of KV events, read: our own form, and what other people's engines send (WIRE.md 7.2).

    batch   array [ts, events, rank, ...] or map; the rank is ``data_parallel_rank`` in vLLM and
            ``attn_dp_rank`` in SGLang
    event   map with the key "type" or, from vLLM and SGLang before June 2026, array [type, field, ...]

What stands behind the fields that we know is skipped, a whole event if its type is unknown: formats grow.
An event that we should know and cannot read makes the batch unreadable: it may have been a removal.

Owns other people's forms. Does not know what is done with an event.
"""

from __future__ import annotations

import struct
from typing import Any

import msgspec

from microserve.protocol.errors import ProtocolViolation
from microserve.protocol.messages.kv.kv_events import (
    MAX_PAYLOAD_NBYTES,
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    ExtraKeys,
    KVEvent,
    KVEventBatch,
    TokenId,
    WireBatch,
    WireHash,
    named_by,
    renamed,
)
from microserve.protocol.types import Buffer

_HEAD_NBYTES = 8
_TOKENS_AT = 3
"""In an array."""
_TYPES = ("BlockStored", "BlockRemoved", "AllBlocksCleared")


class _Loose(msgspec.Struct, array_like=True):
    ts: float
    events: list[msgspec.Raw]
    data_parallel_rank: int | None = None


class _LooseMap(msgspec.Struct):
    ts: float
    events: list[msgspec.Raw]
    data_parallel_rank: int | None = None
    attn_dp_rank: int | None = None


class _Type(msgspec.Struct):
    type: str


class _Tag(msgspec.Struct, array_like=True):
    type: str


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


_BATCH = msgspec.msgpack.Decoder(WireBatch)
_LOOSE = msgspec.msgpack.Decoder(_Loose)
_LOOSE_MAP = msgspec.msgpack.Decoder(_LooseMap)
_EVENT = msgspec.msgpack.Decoder(KVEvent)
_ARRAY_EVENT = msgspec.msgpack.Decoder(_StoredArray | _RemovedArray | _ClearedArray)
_TYPE = msgspec.msgpack.Decoder(_Type)
_TAG = msgspec.msgpack.Decoder(_Tag)


def decode_batch(data: Buffer) -> KVEventBatch:
    """A payload in any of the forms above. Raises :class:`ProtocolViolation` for anything else.

    Tokens are u32. Whether the number of tokens fits the number of blocks is left to the reader: some
    engines announce offloaded blocks without tokens."""
    if not 0 < len(data) <= MAX_PAYLOAD_NBYTES:
        raise ProtocolViolation(f"KV events of {len(data)} bytes, expected 1 to {MAX_PAYLOAD_NBYTES}")
    try:
        if _is_map(data[0]):
            loose_map = _LOOSE_MAP.decode(data)
            rank = loose_map.data_parallel_rank
            return _batch(loose_map.ts, loose_map.events, loose_map.attn_dp_rank if rank is None else rank)
        try:
            batch = _BATCH.decode(data)
        except msgspec.ValidationError:  # not as we would write it: event by event
            loose = _LOOSE.decode(data)
            return _batch(loose.ts, loose.events, loose.data_parallel_rank)
        return _ours(batch.ts, batch.events, batch.data_parallel_rank)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise ProtocolViolation(f"KV events: {error}") from None


def _batch(ts: float, raws: list[msgspec.Raw], rank: int | None) -> KVEventBatch:
    events: list[KVEvent] = []
    for raw in raws:
        data = memoryview(raw)
        is_map = bool(data) and _is_map(data[0])
        kind = (_TYPE if is_map else _TAG).decode(data).type
        if kind in _TYPES:
            events.append(_event(data, is_map))
    batch = _ours(ts, events, rank)
    batch.num_skipped = len(raws) - len(events)
    return batch


def _event(data: memoryview, is_map: bool) -> KVEvent:
    try:
        event: KVEvent = _EVENT.decode(data) if is_map else _ARRAY_EVENT.decode(data).event()
        return event
    except msgspec.ValidationError:
        loose: Any = msgspec.msgpack.decode(data)
        if not _take_first_of_pairs(loose):
            raise
    if is_map:
        return msgspec.convert(loose, BlockStored)
    return msgspec.convert(loose, _StoredArray).event()


def _take_first_of_pairs(stored: Any) -> bool:
    """SGLang under EAGLE writes each token with the one behind it, also across the end of a block: so a match
    may be said to be a block longer than it is. False: these are no pairs."""
    place = "token_ids" if isinstance(stored, dict) else _TOKENS_AT
    try:
        stored[place] = [first for first, _ in stored[place]]
    except (LookupError, TypeError, ValueError):
        return False
    return True


def _ours(ts: float, events: list[KVEvent], rank: int | None) -> KVEventBatch:
    """What is ours in other people's places, put where it belongs. Changes ``events``."""
    epoch = None
    for i, event in enumerate(events):
        if event.epoch is not None:
            epoch, event.epoch = event.epoch, None
        if not isinstance(event, AllBlocksCleared) and event.name_heads is not None:
            events[i] = _with_whole_names(event, event.name_heads)
    return KVEventBatch(ts, events, rank, epoch)


def _with_whole_names(event: BlockStored | BlockRemoved, heads: bytes) -> KVEvent:
    tails = named_by(event)
    if len(heads) != _HEAD_NBYTES * len(tails):
        raise ProtocolViolation(f"KV events: {len(heads)} bytes of name_heads for {len(tails)} names")
    try:
        packed: Any = struct.pack(f">{len(tails)}Q", *tails)
    except struct.error:
        raise ProtocolViolation("KV events: name_heads with names that are no u64") from None
    names: list[WireHash] = [
        heads[at : at + _HEAD_NBYTES] + packed[at : at + _HEAD_NBYTES]
        for at in range(0, len(heads), _HEAD_NBYTES)
    ]
    return renamed(event, names, None)


def _is_map(first: int) -> bool:
    return 0x80 <= first <= 0x8F or first in (0xDE, 0xDF)  # fixmap, map 16, map 32
