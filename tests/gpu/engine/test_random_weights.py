"""Random weights on a GPU: made there, the same for every engine of the kind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from microserve.services.engine.model.model import load_model
from tests.support.engine.model.tiny_model import make_tiny_model


def test_engines_on_gpus_get_the_same_random_weights(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: torch.cuda.is_available() is False")
    directory = make_tiny_model(tmp_path / "llama")
    before = torch.cuda.get_rng_state(0)
    first = load_model(directory, dtype="bfloat16", load_format="random", device="cuda:0")
    assert torch.equal(torch.cuda.get_rng_state(0), before)
    torch.rand(3, device="cuda:0")
    second = load_model(directory, dtype="bfloat16", load_format="random", device="cuda:0")

    pairs = list(zip(first.module.parameters(), second.module.parameters(), strict=True))
    assert all(torch.equal(a, b) and a.device == torch.device("cuda:0") for a, b in pairs)
    assert all(bool(a.isfinite().all()) for a, _ in pairs)
    assert {buffer.device.type for buffer in first.module.buffers()} == {"cuda"}
