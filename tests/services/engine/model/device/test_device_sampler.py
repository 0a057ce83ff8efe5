"""The sampler of a device, on a CPU, against the one for CPUs; test_sampler.py runs every test with both."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from microserve.services.engine.core.batch import SampleSpec
from microserve.services.engine.model import sampler
from microserve.services.engine.model.device.device_sampler import MAX_ROWS, sample_there
from tests.services.engine.model.test_sampler import VOCAB, specs


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32),
    chosen_specs=st.lists(specs(), min_size=1, max_size=MAX_ROWS + 8),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_both_samplers_agree(seed: int, chosen_specs: list[SampleSpec], dtype: torch.dtype) -> None:
    """With logits of few bits, where many are equal, and more rows than are worked on together."""
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(len(chosen_specs), VOCAB, generator=generator)).to(dtype)
    here, there = sampler.sample(logits, chosen_specs), sample_there(logits, chosen_specs)
    assert [one.token_id for one in there] == [one.token_id for one in here]
    for one, other in zip(there, here, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-6)
        assert [token for token, _ in one.top] == [token for token, _ in other.top]
