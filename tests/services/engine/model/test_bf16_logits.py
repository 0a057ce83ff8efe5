"""bf16 against fp32 on a CPU: the bounds that tests/gpu/engine holds a GPU to are neither tight nor wide."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from microserve.services.engine.model.attention.step import device_attention
from microserve.services.engine.model.model import load_model
from microserve.services.engine.model.runner import ModelRunner
from tests.support.engine.model.logit_bounds import (
    BLOCK_SIZE,
    NUM_BLOCKS,
    block_tables,
    excess,
    layout_of,
    log_probabilities,
    make_model,
)


def runner_of(directory: Path, dtype: str, *, is_device: bool = False) -> tuple[ModelRunner, torch.Tensor]:
    model = load_model(directory, dtype=dtype)
    data = torch.zeros(layout_of(model.spec).data_nbytes, dtype=torch.uint8)
    make = device_attention if is_device else None
    return ModelRunner(model, data, NUM_BLOCKS, BLOCK_SIZE, make_attention=make), data


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_bf16_is_within_the_bounds_and_a_lost_block_is_not(tmp_path: Path, family: str) -> None:
    directory = make_model(tmp_path / family, family)
    expected = log_probabilities(runner_of(directory, "float32")[0])

    for is_device in (False, True):
        runner, _ = runner_of(directory, "bfloat16", is_device=is_device)
        assert 0.0 < excess(log_probabilities(runner), expected) < 0.75

    runner, data = runner_of(directory, "bfloat16")
    lost = block_tables()[1][0]  # the 16 tokens before a last one
    blocks = data.view(2, NUM_BLOCKS, -1)  # of both layers

    def lose() -> None:
        blocks[:, lost] = 0

    assert excess(log_probabilities(runner, lose), expected) > 3.0


def test_what_is_equal_has_no_excess(tmp_path: Path) -> None:
    found = log_probabilities(runner_of(make_model(tmp_path / "llama", "llama"), "float32")[0])
    assert excess(found, found) == 0.0
    assert abs(float(torch.tensor(found).exp().sum(dim=1).mean()) - 1.0) < 1e-5
