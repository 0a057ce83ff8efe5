"""llm-d's reader of KV events, by its rules: a Go struct of three items, events as maps whose known keys are
taken by name and whose other keys are not looked at, names as u64 or the last 8 bytes, a topic of three
parts. The program itself cannot run here. And vllm-router's, which refuses keys that vLLM does not send."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from microserve.protocol.messages.kv.kv_events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KVEventBatch,
    WireHash,
    encode_batch,
)
from microserve.services.engine.shell.kv_publisher import topic_of

STORED = ("block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium", "lora_name")
FIELDS = {"BlockStored": STORED, "BlockRemoved": ("block_hashes", "medium"), "AllBlocksCleared": ()}
NAMES: list[WireHash] = [bytes(range(first, first + 16)) for first in (0, 100, 240)]
BATCH = KVEventBatch(
    1.5,
    [
        BlockStored(NAMES[:2], None, [1, 2, 3, 4], 2, extra_keys=[("tenant",), None]),
        BlockStored(NAMES[2:], NAMES[1], [5, 6], 2),
        BlockRemoved(NAMES[:1]),
        AllBlocksCleared(),
    ],
    epoch=7,
)


def read(payload: bytes) -> list[list[Any]]:
    """Each event as its tag and the fields that are known. ``ValueError``: what the program refuses."""
    items = msgspec.msgpack.decode(payload)
    if len(items) != 3:
        raise ValueError("number of fields in array-encoded struct has changed")
    return [
        [event["type"], *(known(event.get(name)) for name in FIELDS[event["type"]])] for event in items[1]
    ]


def known(value: Any) -> Any:
    if isinstance(value, bytes):
        return int.from_bytes(value[-8:], "big")
    return [known(each) for each in value] if isinstance(value, list) else value


def pod_and_model(topic: str) -> tuple[str, str]:
    parts = topic.split("@")
    return (parts[1], parts[2]) if len(parts) == 3 else (topic, "")


@pytest.mark.parametrize("strict", [False, True])
def test_llm_d_reads_every_field_of_ours(strict: bool) -> None:
    first, second, third = (known(name) for name in NAMES)
    assert read(encode_batch(BATCH, strict=strict)) == [
        ["BlockStored", [first, second], None, [1, 2, 3, 4], 2, None, None, None],
        ["BlockStored", [third], second, [5, 6], 2, None, None, None],
        ["BlockRemoved", [first], None],
        ["AllBlocksCleared"],
    ]


def test_llm_d_refuses_a_fourth_item() -> None:
    with pytest.raises(ValueError, match="number of fields"):
        read(msgspec.msgpack.encode([1.5, [], None, 7]))


def test_the_default_topic_names_pod_and_model() -> None:
    assert pod_and_model(topic_of("kv@{id}@{model}", "e0", "org/m")) == ("e0", "org/m")
    assert topic_of("", "e0", "m") == ""


VLLM_KEYS = {
    "BlockStored": {
        *STORED,
        "extra_keys",
        "group_idx",
        "kv_cache_spec_kind",
        "kv_cache_spec_sliding_window",
        "locality",
    },
    "BlockRemoved": {"block_hashes", "medium", "group_idx", "locality"},
    "AllBlocksCleared": set(),
}


def keys_unknown_to_vllm(payload: bytes) -> set[str]:
    _, events, _ = msgspec.msgpack.decode(payload)
    return {key for event in events for key in event.keys() - {"type"} - VLLM_KEYS[event["type"]]}


def test_a_strict_batch_has_vllms_keys_and_no_others() -> None:
    assert keys_unknown_to_vllm(encode_batch(BATCH, strict=True)) == set()
    assert keys_unknown_to_vllm(encode_batch(BATCH)) == {"epoch", "name_heads"}
