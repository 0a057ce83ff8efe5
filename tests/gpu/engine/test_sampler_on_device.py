"""The sampler on a device gives the tokens of the one on a CPU, from the same logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from microserve.kernels.philox import uniform_rows, uniforms
from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.services.engine.core.batch import SampleSpec
from microserve.services.engine.model import sampler
from microserve.services.engine.model.device.device_sampler import sample_there

VOCAB = 49_152
KINDS: list[dict[str, float]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.6, "top_p": 0.9},
    {"temperature": 1.3, "top_k": 50},
    {"temperature": 1.0, "min_p": 0.05, "logprobs": 5},
    {"temperature": 0.0, "repetition_penalty": 1.2, "frequency_penalty": 0.5, "logprobs": 0},
    {"temperature": 0.8, "presence_penalty": 1.0, "min_tokens": 9},
]


@pytest.fixture(scope="module", autouse=True)
def needs_a_device() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: torch.cuda.is_available() is False")


def test_the_noise_is_the_same_to_the_bit() -> None:
    seeds, positions = torch.tensor([[0, 2**63 - 1, 77], [0, 131_071, 5]], device="cuda").unbind()
    found = uniform_rows(seeds.contiguous(), positions.contiguous(), VOCAB).cpu().numpy()
    for row, seed, position in zip(found, seeds.tolist(), positions.tolist(), strict=True):
        np.testing.assert_array_equal(row, uniforms(seed, position, VOCAB))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_tokens_are_the_same(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = (3 * torch.randn(70, VOCAB, generator=generator)).to(dtype)
    specs = []
    for row in range(len(logits)):
        params = SamplingParams(max_tokens=20, seed=row, logit_bias={row: 2.0}, **KINDS[row % len(KINDS)])  # type: ignore[arg-type]
        specs.append(SampleSpec(params, [1, 2, 3 + row], [4, 4, 5], frozenset({0, 2})))
    here, there = sampler.sample(logits, specs), sample_there(logits.cuda(), specs)
    # Rounding may decide where two scores are as close as that: not in one of 70.
    assert [one.token_id for one in there] == [one.token_id for one in here]
    for one, other in zip(there, here, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-5)
        assert [token for token, _ in one.top] == [token for token, _ in other.top]
