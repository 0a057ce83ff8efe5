"""KV event wire format: our bytes are vLLM's, every known form is read, junk is a ProtocolViolation."""

from __future__ import annotations

import contextlib
from typing import Annotated, Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from microserve.protocol.errors import ProtocolViolation
from microserve.protocol.messages.kv.kv_decoding import decode_batch
from microserve.protocol.messages.kv.kv_events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KVEvent,
    KVEventBatch,
    encode_batch,
)
from tests.support.examples import examples

pack = msgspec.msgpack.encode

HASH = bytes(range(16))
NEXT = bytes(range(16, 32))

BATCH = KVEventBatch(
    1.5,
    [
        BlockStored([HASH, NEXT], None, [1, 2, 3, 300], 2, extra_keys=[("tenant",), None]),
        BlockRemoved([HASH]),
        AllBlocksCleared(),
    ],
    epoch=7,
)
GOLDEN = (
    b"\x93" + b"\xcb\x3f\xf8\x00\x00\x00\x00\x00\x00"  # [ts,
    b"\x93"  # events,
    b"\xde\x00\x0b\xa4type\xabBlockStored"
    b"\xacblock_hashes\x92\xcf" + HASH[8:] + b"\xcf" + NEXT[8:] + b"\xb1parent_block_hash\xc0"
    b"\xa9token_ids\x94\x01\x02\x03\xcd\x01\x2c"
    b"\xaablock_size\x02"
    b"\xa7lora_id\xc0\xa6medium\xc0\xa9lora_name\xc0"
    b"\xaaextra_keys\x92\x91\xa6tenant\xc0"
    b"\xaaname_heads\xc4\x10" + HASH[:8] + NEXT[:8] + b"\xa5epoch\x07"
    b"\x84\xa4type\xacBlockRemoved\xacblock_hashes\x91\xcf" + HASH[8:] + b"\xa6medium\xc0"
    b"\xaaname_heads\xc4\x08" + HASH[:8] + b"\x81\xa4type\xb0AllBlocksCleared"
    b"\xc0"  # data_parallel_rank]
)


def test_golden_bytes() -> None:
    assert encode_batch(BATCH) == GOLDEN
    assert decode_batch(GOLDEN) == BATCH
    assert decode_batch(memoryview(GOLDEN)) == BATCH


# What a reader that knows only vLLM's fields declares; none of the first seven may be missing.


class VllmEvent(msgspec.Struct, tag=True):
    pass


class VllmStored(VllmEvent, tag="BlockStored"):
    block_hashes: list[bytes | int]
    parent_block_hash: bytes | int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: list[tuple[Any, ...] | None] | None = None


class VllmRemoved(VllmEvent, tag="BlockRemoved"):
    block_hashes: list[bytes | int]
    medium: str | None


class VllmCleared(VllmEvent, tag="AllBlocksCleared"):
    pass


class VllmBatch(msgspec.Struct, array_like=True):
    ts: float
    events: list[VllmStored | VllmRemoved | VllmCleared]
    data_parallel_rank: int | None = None


class StrictStored(VllmEvent, tag="BlockStored"):
    block_hashes: list[Annotated[int, msgspec.Meta(ge=0)]]
    parent_block_hash: int | None


class StrictRemoved(VllmEvent, tag="BlockRemoved"):
    block_hashes: list[Annotated[int, msgspec.Meta(ge=0)]]


class StrictBatch(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """Three items and names that are ints: what SGLang's and Dynamo's readers take, and no more."""

    ts: float
    events: list[StrictStored | StrictRemoved]
    data_parallel_rank: int | None = None


def u64(name: bytes) -> int:
    """Of 16 bytes the last 8, as vLLM writes its own."""
    return int.from_bytes(name[8:], "big")


def test_a_vllm_reader_takes_ours() -> None:
    batch = msgspec.msgpack.decode(GOLDEN, type=VllmBatch)
    assert batch.events == [
        VllmStored([u64(HASH), u64(NEXT)], None, [1, 2, 3, 300], 2, None, None, None, [("tenant",), None]),
        VllmRemoved([u64(HASH)], None),
        VllmCleared(),
    ]


STORED_MAP = {
    "type": "BlockStored",
    "block_hashes": [2**64 - 1, HASH * 2],
    "parent_block_hash": 5,
    "token_ids": [1, 2, 3, 4],
    "block_size": 2,
    "lora_id": None,
    "medium": "GPU",
    "lora_name": "lora",
    "extra_keys": [["lora", ["image", 3], b"\x00"], None],
    "group_idx": 1,
    "kv_cache_spec_kind": "sliding_window",
    "kv_cache_spec_sliding_window": 128,
    "locality": "LOCAL",
    "a_key_of_tomorrow": {"x": 1},
}
STORED = BlockStored(
    [2**64 - 1, HASH * 2],
    5,
    [1, 2, 3, 4],
    2,
    None,
    "GPU",
    "lora",
    [("lora", ["image", 3], b"\x00"), None],
    1,
    "sliding_window",
    128,
    "LOCAL",
)


SGLANG_MAP = {
    "type": "BlockStored",
    "block_hashes": [-5],
    "parent_block_hash": 4,
    "token_ids": [1, 2],
    "block_size": 2,
    "lora_id": None,
    "medium": "GPU",
    "cache_salt": "tenant",
    "session_id": "s1",
}


@pytest.mark.parametrize(
    ("payload", "batch"),
    [
        pytest.param([1, [STORED_MAP], 3], KVEventBatch(1.0, [STORED], 3), id="vllm-map-all-fields"),
        pytest.param(
            {"ts": 1.0, "events": [STORED_MAP], "data_parallel_rank": 3},
            KVEventBatch(1.0, [STORED], 3),
            id="batch-as-map",
        ),
        pytest.param(
            {"ts": 1.0, "events": [], "attn_dp_rank": 2}, KVEventBatch(1.0, [], 2), id="sglang-batch-as-map"
        ),
        pytest.param(
            [1.0, [{"type": "BlockRemoved", "block_hashes": [1]}]],
            KVEventBatch(1.0, [BlockRemoved([1])]),
            id="map-without-nulls",
        ),
        pytest.param([1.0, [], None, {"x": 1}, 7], KVEventBatch(1.0, []), id="longer-batch"),
        pytest.param(
            [1.0, [{"type": "BlockMoved", "to": 3}, {"type": "BlockRemoved", "block_hashes": [1]}]],
            KVEventBatch(1.0, [BlockRemoved([1])], num_skipped=1),
            id="unknown-type",
        ),
        pytest.param(
            [1.0, [["BlockMoved", [1]], ["AllBlocksCleared", "more"]], 2],
            KVEventBatch(1.0, [AllBlocksCleared()], 2, num_skipped=1),
            id="unknown-tag",
        ),
        pytest.param(
            {"ts": 1.0, "events": [["BlockMoved"], {"type": "AllBlocksCleared"}]},
            KVEventBatch(1.0, [AllBlocksCleared()], num_skipped=1),
            id="both-forms",
        ),
        pytest.param(
            [1.0, [SGLANG_MAP], None],
            KVEventBatch(1.0, [BlockStored([-5], 4, [1, 2], 2, medium="GPU", cache_salt="tenant")]),
            id="sglang-map",
        ),
        pytest.param(
            [1.0, [SGLANG_MAP | {"token_ids": [[1, 2], [2, 3]]}], None],
            KVEventBatch(1.0, [BlockStored([-5], 4, [1, 2], 2, medium="GPU", cache_salt="tenant")]),
            id="sglang-eagle-map",
        ),
        pytest.param(
            [1.0, [["BlockStored", [1], None, [[7, 8]], 1, None]]],
            KVEventBatch(1.0, [BlockStored([1], None, [7], 1)]),
            id="sglang-eagle-array",
        ),
        pytest.param(
            [
                1.0,
                [
                    ["BlockStored", [HASH * 2], HASH, [1, 2], 2, None, "GPU", "lora", [["salt"]], 0, "full"],
                    ["BlockRemoved", [HASH * 2], "CPU", 1],
                    ["AllBlocksCleared"],
                ],
                0,
            ],
            KVEventBatch(
                1.0,
                [
                    BlockStored(
                        [HASH * 2], HASH, [1, 2], 2, None, "GPU", "lora", [("salt",)], 0, "full", None
                    ),
                    BlockRemoved([HASH * 2], "CPU", 1),
                    AllBlocksCleared(),
                ],
                0,
            ),
            id="vllm-arrays",
        ),
        pytest.param(
            [
                1.0,
                [
                    ["BlockStored", [-5, 2**63], None, [1, 2, 3, 4], 2, None, "GPU"],
                    ["BlockRemoved", [-5], "CPU_PINNED"],
                    ["AllBlocksCleared"],
                ],
                1,
            ],
            KVEventBatch(
                1.0,
                [
                    BlockStored([-5, 2**63], None, [1, 2, 3, 4], 2, None, "GPU"),
                    BlockRemoved([-5], "CPU_PINNED"),
                    AllBlocksCleared(),
                ],
                1,
            ),
            id="sglang-arrays",
        ),
        pytest.param(
            [1.0, [["BlockStored", [1], None, [1], 1, 0], ["BlockRemoved", [1]]]],
            KVEventBatch(1.0, [BlockStored([1], None, [1], 1, 0), BlockRemoved([1])]),
            id="oldest-arrays",
        ),
    ],
)
def test_every_known_form_is_read(payload: object, batch: KVEventBatch) -> None:
    assert decode_batch(pack(payload)) == batch


@pytest.mark.parametrize(
    "payload",
    [
        pytest.param([1.0], id="no-events"),
        pytest.param([1.0, [[]]], id="no-tag"),
        pytest.param([1.0, [[7]]], id="tag-is-no-text"),
        pytest.param([1.0, [None]], id="no-event"),
        pytest.param([1.0, [], "rank"], id="rank-is-text"),
        pytest.param([1.0, [SGLANG_MAP | {"token_ids": [[1, 2, 3]]}]], id="token-triples"),
        pytest.param([1.0, [SGLANG_MAP | {"token_ids": [[1, 2], 3]}]], id="pairs-and-tokens"),
        pytest.param([1.0, [SGLANG_MAP | {"token_ids": [[-1, 2], [2, 3]]}]], id="negative-pair"),
        pytest.param([1.0, [SGLANG_MAP | {"name_heads": bytes(8)}]], id="head-without-name"),
        pytest.param([1.0, [SGLANG_MAP | {"name_heads": bytes(16)}]], id="head-of-a-name-that-is-no-u64"),
        pytest.param([1.0, [SGLANG_MAP | {"name_heads": "text"}]], id="heads-are-text"),
        pytest.param([1.0, [{"block_hashes": [1]}]], id="no-type"),
        pytest.param([1.0, [{"type": "BlockRemoved"}]], id="no-hashes"),
        pytest.param([1.0, [["BlockStored", [1], None, [1]]]], id="array-too-short"),
        pytest.param([1.0, [["BlockRemoved", ["text"]]]], id="hash-is-text"),
        pytest.param([1.0, [["BlockRemoved", [bytes(65)]]]], id="hash-too-long"),
        pytest.param([1.0, [["BlockStored", [1], None, [-1], 1]]], id="negative-token"),
        pytest.param([1.0, [["BlockStored", [1], None, [2**32], 1]]], id="token-not-u32"),
        pytest.param({"ts": 1.0}, id="map-without-events"),
        pytest.param("text", id="text"),
        pytest.param(None, id="nil"),
    ],
)
def test_what_fits_no_form_is_a_violation(payload: object) -> None:
    with pytest.raises(ProtocolViolation):
        decode_batch(pack(payload))


@settings(max_examples=examples(500))
@given(st.binary(max_size=200))
@example(b"")
@example(b"\x91" * 5000)  # deeper than any parser should follow
@example(b"\xdd\xff\xff\xff\xff")  # an array that claims 4 billion items
@example(GOLDEN + b"\x00")
def test_random_bytes_never_raise_anything_else(data: bytes) -> None:
    with contextlib.suppress(ProtocolViolation):
        decode_batch(data)


# Any msgpack value, where extra keys take it: timestamps out of range, map keys that cannot be hashed ...
ANYTHING = st.one_of(
    st.binary(max_size=40),
    st.binary(max_size=12).map(lambda body: b"\xc7" + bytes([len(body)]) + b"\xff" + body),  # timestamp
    st.just(b"\x81\x81\x01\x02\x03"),  # {{1: 2}: 3}
    st.just(b"\x91" * 3000 + b"\xc0"),
    st.just(b"\xa2\xff\xff"),  # text that is not UTF-8
)


@settings(max_examples=examples(300))
@given(ANYTHING, st.booleans())
def test_random_extra_keys_never_raise_anything_else(value: bytes, as_map: bool) -> None:
    head = b"\x92\x01\x91"
    if as_map:
        event = b"\x85\xa4type\xabBlockStored\xacblock_hashes\x90\xb1parent_block_hash\xc0\xa9token_ids\x90"
        event = event.replace(b"\x85", b"\x86", 1) + b"\xaablock_size\x01\xaaextra_keys\x91\x91"
    else:
        event = b"\x99\xabBlockStored\x90\xc0\x90\x01\xc0\xc0\xc0\x91\x91"
    with contextlib.suppress(ProtocolViolation):
        decode_batch(head + event + value)


@settings(max_examples=examples(500))
@given(st.integers(0, len(GOLDEN) - 1), st.integers(0, 255), st.booleans())
def test_damaged_batches_never_raise_anything_else(at: int, byte: int, cut: bool) -> None:
    damaged = GOLDEN[:at] if cut else GOLDEN[:at] + bytes([byte]) + GOLDEN[at + 1 :]
    with contextlib.suppress(ProtocolViolation):
        decode_batch(damaged)


NAMES = st.one_of(st.integers(-(2**63), 2**64 - 1), st.binary(max_size=64))
STORED_EVENTS: st.SearchStrategy[KVEvent] = st.builds(
    BlockStored,
    st.lists(NAMES, max_size=3),
    st.none() | NAMES,
    st.lists(st.integers(0, 2**32 - 1), max_size=5),
    st.integers(0, 1024),
    lora_id=st.none() | st.integers(0, 9),
    medium=st.none() | st.text(),
    lora_name=st.none() | st.text(),
    extra_keys=st.none() | st.lists(st.none() | st.tuples(st.text() | st.binary()), max_size=3),
    group_idx=st.none() | st.integers(0, 3),
)
REMOVED_EVENTS: st.SearchStrategy[KVEvent] = st.builds(BlockRemoved, st.lists(NAMES), st.none() | st.text())


@given(
    st.builds(
        KVEventBatch,
        st.floats(allow_nan=False),
        st.lists(STORED_EVENTS | REMOVED_EVENTS | st.builds(AllBlocksCleared), max_size=4),
        st.none() | st.integers(0, 63),
        st.none() | st.integers(1, 2**62),
    )
)
def test_round_trip(batch: KVEventBatch) -> None:
    if not batch.events:
        batch.epoch = None  # it travels in the first event
    assert decode_batch(encode_batch(batch)) == batch


OUR_NAMES = st.binary(min_size=16, max_size=16)
WHOLE_EVENTS = st.one_of(
    st.builds(BlockRemoved, st.lists(OUR_NAMES, max_size=4)),
    st.builds(BlockStored, st.lists(OUR_NAMES, max_size=4), st.none() | OUR_NAMES, st.just([]), st.just(2)),
)


@given(st.lists(WHOLE_EVENTS, min_size=1, max_size=4), st.integers(1, 2**62))
def test_our_names_are_u64_to_others_and_whole_to_us(events: list[KVEvent], epoch: int) -> None:
    payload = encode_batch(KVEventBatch(1.0, events, epoch=epoch))

    theirs = msgspec.msgpack.decode(payload, type=StrictBatch).events
    assert [each.block_hashes for each in theirs] == [
        [u64(name) for name in event.block_hashes]  # type: ignore[union-attr, arg-type]
        for event in events
    ]
    assert decode_batch(payload) == KVEventBatch(1.0, events, epoch=epoch)
