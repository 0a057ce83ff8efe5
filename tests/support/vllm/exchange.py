"""KV between a vLLM and a peer, and what is compared of it."""

from __future__ import annotations

import random

import numpy as np
from numpy.typing import NDArray

from microserve.kvcache.heap.shm import ShmView
from microserve.protocol.messages.kv.grant import Grant
from microserve.services.engine.vllm.link import Sent
from tests.support.vllm.hosted import Hosted, Peer


def prompt_of(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(3, 300), k=length)


def fetch(vllm: Hosted, peer: Peer, prompt: list[int]) -> Grant:
    """KV of all of the prompt as vLLM computes it, in the peer's blocks."""
    grant = peer.grant(len(prompt))
    request_id, send = vllm.send(prompt, grant)
    vllm.run(request_id)
    sent = vllm.hear(Sent)
    assert sent.id == send
    assert sent.nbytes == len(grant.blocks) * vllm.layout.block_nbytes * vllm.layout.num_layers
    peer.verify(grant)
    return grant


def kv_of(heap: ShmView, blocks: list[int]) -> list[NDArray[np.uint8]]:
    """Bytes of these blocks in every layer, a row a layer."""
    layout = heap.layout
    return [
        np.concatenate(
            [
                heap.read_data(layer * layout.layer_nbytes + block * layout.block_nbytes, layout.block_nbytes)
                for block in blocks
            ]
        )
        for layer in range(layout.num_layers)
    ]


def assert_equal(mine: list[NDArray[np.uint8]], theirs: list[NDArray[np.uint8]]) -> None:
    assert len(mine) == len(theirs) == 3
    for layer, (one, other) in enumerate(zip(mine, theirs, strict=True)):
        assert np.array_equal(one, other), f"layer {layer}"
