"""The Triton scatter, interpreted, against the oracle: every byte of the layer, and none around it."""

from __future__ import annotations

import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from microserve.kernels import reference
from microserve.kernels.scatter.triton_scatter import launch_scatter
from tests.support.engine.device.kernel_cases import random_slots

GUARD = 64  # elements before and after the pool that nothing may touch

views = st.sampled_from(["contiguous", "packed", "head major"])


def rows(view: str, num_tokens: int, num_heads: int, head_dim: int, generator: torch.Generator) -> Tensor:
    """[num_tokens, num_heads, head_dim] of int32, any bits."""
    shape = (num_tokens, num_heads, head_dim)
    if view == "packed":
        shape = (num_tokens, num_heads + 2, head_dim)
    elif view == "head major":
        shape = (num_heads, num_tokens, head_dim)
    bits = torch.randint(-(1 << 31), 1 << 31, shape, generator=generator).to(torch.int32)
    return {"contiguous": bits, "packed": bits[:, 2:], "head major": bits.transpose(0, 1)}[view]


@settings(deadline=None, max_examples=60, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    view=st.tuples(views, views),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    block_size=st.sampled_from([1, 3, 16]),
    num_heads=st.integers(1, 3),
    head_dim=st.sampled_from([1, 3, 8, 64, 80, 300]),
    num_tokens=st.integers(0, 40),
    skipped=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 2**32),
)
def test_bytes_equal_the_oracle(
    view: tuple[str, str],
    dtype: torch.dtype,
    block_size: int,
    num_heads: int,
    head_dim: int,
    num_tokens: int,
    skipped: float,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    raw = torch.int16 if dtype.itemsize == 2 else torch.int32
    key, value = (rows(name, num_tokens, num_heads, head_dim, generator).to(raw).view(dtype) for name in view)
    num_blocks = num_tokens // block_size + 2
    slots = random_slots(num_tokens, num_blocks * block_size, skipped, generator)
    shape = (num_blocks, 2, block_size, num_heads, head_dim)
    numel = torch.Size(shape).numel()
    memory = torch.randint(-(1 << 15), 1 << 15, (numel + 2 * GUARD,), generator=generator).to(raw)
    want = memory.clone()
    inside = torch.where((slots >= 0) & (slots < num_blocks * block_size), slots, -1)
    oracle = want[GUARD:-GUARD].view(shape)
    reference.write_kv(oracle, key.view(raw), value.view(raw), inside)

    launch_scatter(key, value, slots, memory[GUARD:-GUARD].view(dtype).view(shape))
    assert torch.equal(memory, want)
