"""A stock vLLM's events, as it sent them, say what it then finds cached (tests/data/README.md)."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from microserve.protocol.messages.kv.kv_decoding import decode_batch
from microserve.protocol.messages.kv.kv_events import AllBlocksCleared, BlockRemoved, BlockStored
from tests.support.kvcache.prefix_indexes import FORMS, new_index

RECORDED = Path(__file__).parents[2] / "data/vllm_events.json.gz"
MODEL = "m"


@pytest.fixture(scope="module")
def recorded() -> Any:
    return json.loads(gzip.decompress(RECORDED.read_bytes()))


@pytest.mark.parametrize("form", FORMS)
def test_hits_are_what_vllm_itself_found(recorded: Any, form: str) -> None:
    size = recorded["block_size"]
    index = new_index(form, size, MODEL, 1 << 30)
    applied = num_resets = 0
    for request in recorded["requests"]:
        for payload in recorded["batches"][applied : request["batches"]]:
            index.apply("v0", decode_batch(bytes.fromhex(payload)).events)
        applied = request["batches"]
        tokens = request["tokens"]
        matched = index.lookup(tokens, request["salt"]).get("v0", 0)
        most = (len(tokens) - 1) // size * size  # vLLM computes the last token at least
        # A reset is told with the step after it, which is this request's.
        is_reset = AllBlocksCleared() in decode_batch(bytes.fromhex(recorded["batches"][applied])).events
        num_resets += is_reset
        assert (0 if is_reset else min(matched, most)) == request["cached"]
        index.check_integrity()
    assert num_resets == 1
    assert sum(vars_of(index.counters)) == 0


def test_the_recording_holds_every_kind_of_event(recorded: Any) -> None:
    batches = [decode_batch(bytes.fromhex(payload)) for payload in recorded["batches"]]
    kinds = {type(event) for batch in batches for event in batch.events}
    assert kinds == {BlockStored, BlockRemoved, AllBlocksCleared}
    assert all(batch.data_parallel_rank == 0 and batch.epoch is None for batch in batches)
    assert sum(request["cached"] > 0 for request in recorded["requests"]) > 20
    assert len({request["salt"] for request in recorded["requests"]}) == 3


def vars_of(counters: Any) -> list[int]:
    return [getattr(counters, name) for name in counters.__slots__]
