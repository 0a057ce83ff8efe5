"""The native step computes the models that it says it computes: against transformers, in fp32 and bf16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from microserve.services.engine.model.model import load_model
from microserve.services.engine.native.packing import missing, native_runner
from microserve.services.engine.native.runner import NativeRunner
from tests.support.engine.logit_bounds import (
    BLOCK_SIZE,
    NUM_BLOCKS,
    block_tables,
    excess,
    layout_of,
    log_probabilities,
    make_model,
)
from tests.support.engine.tiny_model import FAMILIES, make_tiny_model

VARIATIONS: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in FAMILIES),
    ("llama", {"head_dim": 80, "attention_bias": True, "tie_word_embeddings": False}),
    ("llama", {"hidden_size": 80, "num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 16}),
    ("qwen3", {"head_dim": 64, "attention_bias": True}),
    ("mistral", {"sliding_window": None, "tie_word_embeddings": True}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0}}),
]


def runner_of(
    directory: Path, dtype: str, data: torch.Tensor | None = None
) -> tuple[NativeRunner, torch.Tensor]:
    model = load_model(directory, dtype=dtype)
    if data is None:
        data = torch.full((layout_of(model.spec).data_nbytes,), 0xFF, dtype=torch.uint8)
    return native_runner(model, data.numpy(), NUM_BLOCKS, BLOCK_SIZE, threads=1, max_rows=512), data


@pytest.mark.parametrize(("family", "changed"), VARIATIONS)
def test_logits_in_fp32_are_those_of_transformers(
    tmp_path: Path, family: str, changed: dict[str, Any]
) -> None:
    directory = make_tiny_model(tmp_path, family, **changed)
    oracle: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    model = load_model(directory, dtype="float32")
    assert missing(model) is None
    data = np.full(layout_of(model.spec).data_nbytes, 0xFF, np.uint8)
    runner = native_runner(model, data, NUM_BLOCKS, BLOCK_SIZE, threads=1, max_rows=512)
    assert runner.numerics.is_exact
    ids = torch.randint(3, 300, (290,), generator=torch.Generator().manual_seed(1))
    at = np.arange(290)
    with torch.inference_mode():
        expected = oracle(input_ids=ids[None], logits_to_keep=0).logits[0]
    found = torch.from_numpy(runner.step.run(ids.numpy(), at, at, [(290, 290, list(range(NUM_BLOCKS)))], at))
    runner.step.close()
    assert (found - expected).abs().max() <= 1e-3 * (expected.max() - expected.min())


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_is_within_the_bounds_and_a_lost_block_is_not(tmp_path: Path, family: str) -> None:
    directory = make_model(tmp_path / family, family)
    expected = log_probabilities(runner_of(directory, "float32")[0])
    assert 0.0 < excess(log_probabilities(runner_of(directory, "bfloat16")[0]), expected) < 0.75

    runner, data = runner_of(directory, "bfloat16")
    lost = block_tables()[1][0]  # the 16 tokens before a last one
    blocks = data.view(2, NUM_BLOCKS, -1)  # of both layers

    def lose() -> None:
        blocks[:, lost] = 0

    if family not in ("mistral", "qwen2"):  # their windows are shorter than what is lost is far
        assert excess(log_probabilities(runner, lose), expected) > 3.0


@pytest.mark.parametrize(
    ("family", "changed", "told"),
    [
        ("llama", {"hidden_act": "gelu"}, "activation gelu"),
        ("llama", {"mlp_bias": True}, "biases of an MLP"),
        (
            "llama",
            {"hidden_size": 66, "num_attention_heads": 66, "num_key_value_heads": 2, "head_dim": 2},
            "33 query heads",
        ),
    ],
)
def test_what_it_does_not_compute_is_named(
    tmp_path: Path, family: str, changed: dict[str, Any], told: str
) -> None:
    model = load_model(make_tiny_model(tmp_path, family, **changed), dtype="float32")
    assert told in (missing(model) or "")
