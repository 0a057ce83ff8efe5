"""A whole step of exact kernels, interpreted: bits over any company, closeness to transformers in fp32."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from microserve.kernels.attention.triton_attention import Tiles
from microserve.kernels.exact import triton_segments
from microserve.services.engine.model.device.exact import make_exact
from microserve.services.engine.model.model import DTYPES, load_model
from microserve.services.engine.model.runner import ModelRunner
from tests.support.engine.model.exact_rows import Rerun, Walked, alone, differing, together
from tests.support.engine.model.tiny_model import make_tiny_model

NUM_BLOCKS, BLOCK_SIZE = 16, 4
SIZES = {"intermediate_size": 24, "vocab_size": 259}
FP32_BOUND = 1e-4
"""Of logits up to 8."""

MakeRunner = Callable[[str, str], ModelRunner]


@pytest.fixture(autouse=True)
def short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that contexts of twenty tokens have two of them."""
    attend = partial(triton_segments.paged_attention, segment=16, tiles=Tiles(16, 16, 4, 2))
    monkeypatch.setattr(triton_segments, "paged_attention", attend)


@pytest.fixture(scope="module")
def make_runner(tmp_path_factory: pytest.TempPathFactory) -> MakeRunner:
    def make(family: str, dtype: str, directory: Path | None = None) -> ModelRunner:
        directory = directory or directory_of(tmp_path_factory, family)
        model = make_exact(load_model(directory, dtype=dtype))
        spec = model.spec
        half = BLOCK_SIZE * spec.num_kv_heads * spec.head_dim
        nbytes = spec.num_layers * NUM_BLOCKS * 2 * half * (4 if dtype == "float32" else 2)
        runner = ModelRunner(model, np.full(nbytes, 0xFF, np.uint8), NUM_BLOCKS, BLOCK_SIZE)
        assert runner.numerics.is_exact
        return runner

    return make


def directory_of(factory: pytest.TempPathFactory, family: str) -> Path:
    directory = factory.getbasetemp() / family
    return directory if directory.is_dir() else make_tiny_model(directory, family, **SIZES, vocab=259)


def prompts_of(rng: random.Random, lengths: list[int]) -> list[list[int]]:
    """With a common beginning."""
    common = [rng.randrange(259) for _ in range(8)]
    return [(common + [rng.randrange(259) for _ in range(20)])[:length] for length in lengths]


@pytest.mark.parametrize(("family", "dtype"), [("qwen3", "bfloat16"), ("mistral", "float32")])
def test_a_row_has_the_same_bits_in_any_company(make_runner: MakeRunner, family: str, dtype: str) -> None:
    prompts = prompts_of(random.Random(1), [18, 5, 1])
    runner = make_runner(family, dtype)
    want = alone(runner, prompts)
    for seed in range(3):
        got = together(runner, prompts, random.Random(seed), received=want if seed else None)
        assert not differing(want, got), seed

    rerun = Rerun()
    runner.capture_decodes(3, 20, rerun)
    got = together(runner, prompts, random.Random(9), is_layerwise=False)
    assert rerun.count > 0
    assert not differing(want, got)


def test_it_is_the_kernels_that_do_it(make_runner: MakeRunner) -> None:
    """Planted: the head by torch, which has another sum for one row than for many."""
    prompts = prompts_of(random.Random(1), [12, 12])
    runner = make_runner("qwen3", "float32")
    want = alone(runner, prompts)
    module: Any = runner._module
    head = torch.nn.Linear(40, 259, bias=False)
    head.weight = module.lm_head.weight
    module.lm_head = Split(head)
    assert any("logits" in place for place in differing(want, together(runner, prompts, random.Random(2))))


class Split(torch.nn.Module):
    """A product whose sum is cut where there is one row."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self._linear = linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-2] > 1:
            return self._linear(x)  # type: ignore[no-any-return]
        weight, half = self._linear.weight, x.shape[-1] // 2
        return x[..., :half] @ weight[:, :half].T + x[..., half:] @ weight[:, half:].T


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "smollm3"])
def test_it_computes_the_model(
    make_runner: MakeRunner, tmp_path_factory: pytest.TempPathFactory, family: str, dtype: str
) -> None:
    prompts = prompts_of(random.Random(3), [18])
    got: Walked = together(make_runner(family, dtype), prompts, random.Random(4))
    want, theirs = (
        logits_of(directory_of(tmp_path_factory, family), prompts, one) for one in ("float32", dtype)
    )
    # As far from fp32 as transformers in that dtype, and no further.
    bound = max(FP32_BOUND, 1.5 * (theirs - want).abs().max().item())
    assert (0, 17) in got.logits
    for (_, position), logits in got.logits.items():
        torch.testing.assert_close(logits.float(), want[position], atol=bound, rtol=0.0)


def logits_of(directory: Path, prompts: list[list[int]], dtype: str) -> torch.Tensor:
    """[tokens, vocab_size] of the only prompt, by transformers."""
    oracle: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=DTYPES[dtype])
    with torch.inference_mode():
        logits: torch.Tensor = oracle(input_ids=torch.tensor(prompts)).logits[0]
    return logits.float()
