"""In bf16 on a GPU, over the KV of a ``cuda_ipc`` heap: within stated bounds of fp32 on a CPU.

tests/services/engine/model/test_bf16_logits.py shows that the bounds catch a lost block.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from microserve.kvcache.heap.factory import make_heap
from microserve.protocol.settings.sources import load_settings
from microserve.services.engine.model.model import load_model
from microserve.services.engine.model.runner import ModelRunner
from tests.support.engine.model.logit_bounds import (
    BLOCK_SIZE,
    NUM_BLOCKS,
    excess,
    layout_of,
    log_probabilities,
    make_model,
)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_bf16_on_a_gpu_is_within_the_bounds_of_fp32(tmp_path: Path, family: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: torch.cuda.is_available() is False")
    directory = make_model(tmp_path / family, family)
    here = load_model(directory, dtype="float32")
    region = torch.zeros(layout_of(here.spec).data_nbytes, dtype=torch.uint8)
    expected = log_probabilities(ModelRunner(here, region, NUM_BLOCKS, BLOCK_SIZE))

    settings = load_settings(overrides=["engine.device=cuda:0", "kvcache.heap=cuda_ipc"])
    there = load_model(directory, dtype="bfloat16", device=settings.engine.device)
    heap, data = make_heap(settings, layout_of(there.spec), 7)
    with heap:
        found = log_probabilities(ModelRunner(there, data, NUM_BLOCKS, BLOCK_SIZE))
    assert 0.0 < excess(found, expected) <= 1.0
