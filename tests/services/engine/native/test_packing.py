"""The native step computes the models that it says it computes: against transformers, in fp32 and bf16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from microserve.kernels.cpu.library import library
from microserve.services.engine.model.model import load_model
from microserve.services.engine.native.packing import missing, native_runner, pack_model
from microserve.services.engine.native.runner import NativeRunner
from tests.support.engine.model.logit_bounds import (
    BLOCK_SIZE,
    NUM_BLOCKS,
    block_tables,
    excess,
    layout_of,
    log_probabilities,
    make_model,
)
from tests.support.engine.model.tiny_model import FAMILIES, make_tiny_model

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


def round_to_int8(module: Any) -> None:
    """In place: the matrices of layers and the head, a scale for each output; embeddings that are looked up
    stay what they are, tied or not."""
    module.lm_head.weight = nn.Parameter(module.lm_head.weight.detach().clone())
    layers = [each for each in module.model.layers.modules() if isinstance(each, nn.Linear)]
    for linear in (*layers, module.lm_head):
        weight = linear.weight.detach().numpy()
        scales = np.abs(weight).max(axis=1, keepdims=True) / np.float32(127)
        linear.weight = nn.Parameter(torch.from_numpy(np.rint(weight / scales) * scales))


@pytest.mark.parametrize("family", FAMILIES)
def test_int8_says_what_transformers_says_of_a_model_that_was_rounded_so(tmp_path: Path, family: str) -> None:
    directory = make_tiny_model(tmp_path, family)
    oracle: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    ids = torch.randint(3, 300, (90,), generator=torch.Generator().manual_seed(1))
    at = np.arange(90)
    with torch.inference_mode():
        plain = oracle(input_ids=ids[None], logits_to_keep=0).logits[0]
        round_to_int8(oracle)
        expected = oracle(input_ids=ids[None], logits_to_keep=0).logits[0]
        answer = oracle.generate(ids[None], max_new_tokens=24, do_sample=False, eos_token_id=None)[0]
        gaps = oracle(input_ids=answer[None]).logits[0, 89:-1].topk(2).values.diff().abs()
    model = load_model(directory, dtype="float32")
    data = np.full(layout_of(model.spec).data_nbytes, 0xFF, np.uint8)
    runner = native_runner(model, data, NUM_BLOCKS, BLOCK_SIZE, threads=1, max_rows=512, weights="int8")
    table = list(range(NUM_BLOCKS))
    found = torch.from_numpy(runner.step.run(ids.numpy(), at, at, [(90, 90, table)], at))
    spread = expected.max() - expected.min()
    apart = (found - expected).abs().max()
    assert apart <= 1e-3 * spread
    assert (found - plain).abs().max() > 3e-3 * spread  # what rounding did is more than that

    assert gaps.min() > 4 * apart, "another seed: this text hangs on a last bit"
    said = [int(found[-1].argmax())]
    for position in range(90, 90 + 23):
        token, place, spans = np.array([said[-1]]), np.array([position]), [(1, position + 1, table)]
        (logits,) = runner.step.run(token, place, place, spans, np.array([0]))
        said.append(int(logits.argmax()))
    assert said == answer[90:].tolist()
    runner.step.close()


def test_a_rounded_model_is_another_one(tmp_path: Path) -> None:
    model = load_model(make_tiny_model(tmp_path, "llama"), dtype="bfloat16")
    plain, rounded = (pack_model(model, library(), weights) for weights in ("dtype", "int8"))
    assert plain.spec.revision == model.spec.revision != rounded.spec.revision
    assert len(rounded.spec.revision) == len(plain.spec.revision)
    assert plain.numerics(library(), "cpu1").name.startswith("cpu1-bfloat16-")
    assert rounded.numerics(library(), "cpu1").name.startswith("cpu1-bfloat16-int8-")


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
