"""An exact engine on a GPU: bits of logits, log-probabilities and KV over any company, and closeness to fp32.

The same walks as in Triton's interpreter (tests/kernels/interpreted/exact_step.py), with the tiles and the
segments in use, in a stream, and replayed from CUDA graphs.
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from microserve.services.engine.model.device.exact import make_exact
from microserve.services.engine.model.model import load_model
from microserve.services.engine.model.runner import ModelRunner
from tests.support.engine.model import logit_bounds
from tests.support.engine.model.exact_rows import Walked, alone, differing, together
from tests.support.engine.model.tiny_model import make_tiny_model

NUM_BLOCKS, BLOCK_SIZE, VOCAB = 160, 16, 1003
LENGTHS = [700, 530, 130, 65, 17, 1]


@pytest.fixture(scope="module")
def device() -> str:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: torch.cuda.is_available() is False")
    pytest.importorskip("triton", reason="no triton")
    return "cuda:0"


def make_runner(directory: Path, dtype: str, device: str, *, exact: bool = True) -> ModelRunner:
    model = load_model(directory, dtype=dtype, device=device)
    spec = model.spec
    row = spec.num_kv_heads * spec.head_dim * (4 if dtype == "float32" else 2)
    nbytes = spec.num_layers * NUM_BLOCKS * 2 * BLOCK_SIZE * row
    pool = torch.full((nbytes,), 0xFF, dtype=torch.uint8, device=device)
    return ModelRunner(make_exact(model) if exact else model, pool, NUM_BLOCKS, BLOCK_SIZE)


def prompts_of(rng: random.Random) -> list[list[int]]:
    common = [rng.randrange(VOCAB) for _ in range(64)]
    return [(common + [rng.randrange(VOCAB) for _ in range(700)])[:length] for length in LENGTHS]


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("qwen3", "bfloat16"), ("mistral", "bfloat16"), ("llama", "float16"), ("smollm3", "float32")],
)
def test_a_row_has_the_same_bits_in_any_company(tmp_path: Path, device: str, family: str, dtype: str) -> None:
    directory = make_tiny_model(tmp_path / family, family, vocab=VOCAB, head_dim=64, hidden_size=384)
    prompts = prompts_of(random.Random(1))
    runner = make_runner(directory, dtype, device)
    assert runner.numerics.is_exact and "-sm" in runner.numerics.name
    want = alone(runner, prompts)
    for seed in range(6):
        got = together(runner, prompts, random.Random(seed), received=want if seed % 2 else None)
        assert not differing(want, got), seed
    runner.capture_decodes(len(prompts), 720)
    for seed in range(6, 9):
        got = together(runner, prompts, random.Random(seed), is_layerwise=False, received=want)
        assert not differing(want, got), seed


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_exact_bf16_is_within_the_bounds_of_fp32(tmp_path: Path, device: str, family: str) -> None:
    directory = logit_bounds.make_model(tmp_path / family, family)
    here = load_model(directory, dtype="float32")
    size = logit_bounds.NUM_BLOCKS, logit_bounds.BLOCK_SIZE
    region = torch.zeros(logit_bounds.layout_of(here.spec).data_nbytes, dtype=torch.uint8)
    expected = logit_bounds.log_probabilities(ModelRunner(here, region, *size))
    there = make_exact(load_model(directory, dtype="bfloat16", device=device))
    pool = torch.zeros(logit_bounds.layout_of(there.spec).data_nbytes, dtype=torch.uint8, device=device)
    found = logit_bounds.log_probabilities(ModelRunner(there, pool, *size))
    assert 0.0 < logit_bounds.excess(found, expected) <= 1.0


def test_an_ordinary_engine_does_not_pass(tmp_path: Path, device: str) -> None:
    """So the walks can tell: libraries and splits by the batch leave other bits."""
    directory = make_tiny_model(tmp_path / "qwen3", "qwen3", vocab=VOCAB, head_dim=64, hidden_size=384)
    prompts = prompts_of(random.Random(1))
    runner = make_runner(directory, "bfloat16", device, exact=False)
    want: Walked = alone(runner, prompts)
    assert differing(want, together(runner, prompts, random.Random(0)))


def test_a_head_of_a_real_vocabulary_and_a_deep_row(device: str) -> None:
    """Rows of products as large as those of an 8B model, alone and among up to 300 others."""
    from microserve.kernels.exact.triton_product import product

    generator = torch.Generator(device).manual_seed(1)
    for outs, ins in ((4096, 4096), (4096, 14336), (128256, 4096)):
        weight = torch.randn(outs, ins, generator=generator, device=device).bfloat16()
        x = torch.randn(300, ins, generator=generator, device=device).bfloat16()
        whole = product(x, weight)
        for count in (1, 2, 16, 63, 64, 65, 256):
            places = torch.from_numpy(np.random.default_rng(count).permutation(300)[:count]).to(device)
            assert torch.equal(product(x[places], weight), whole[places]), (outs, ins, count)
        want = x.float() @ weight.float().T
        torch.testing.assert_close(whole.float(), want, atol=2.0, rtol=2e-2)
