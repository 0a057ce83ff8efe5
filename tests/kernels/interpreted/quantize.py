"""The Triton quantisation kernels, interpreted, against plain torch: equal in every byte.

Without a cast to or from e4m3 in the kernels, the interpreter's broken one (1.99 becomes 1.0) does not
matter. Its cast to bf16 is broken too (it truncates), so bf16 is quantised here, but gathered on a GPU only.
"""

# mypy: disable-error-code="import-untyped, import-not-found, no-untyped-def, untyped-decorator"

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from microserve.kernels.quantize.kv_quantize import dequantize_gather, quantize_scatter
from microserve.kernels.quantize.triton_quantize import (
    decode_e4m3,
    encode_e4m3,
    launch_gather,
    launch_scatter,
)
from microserve.kernels.scatter.arrival_signal import ArrivalSignal
from tests.support.engine.device.kernel_cases import random_slots

FORMATS = [torch.int8, torch.float8_e4m3fn]


@triton.jit
def encode(values, codes, COUNT: tl.constexpr):
    at = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    tl.store(codes + at, encode_e4m3(tl.load(values + at)))


@triton.jit
def decode(codes, values, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    tl.store(values + at, decode_e4m3(tl.load(codes + at)))


def test_every_code_decodes_as_torch_does() -> None:
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    values = torch.empty(256)
    decode[(1,)](codes, values, 256)
    want = codes.view(torch.float8_e4m3fn).float()
    assert torch.equal(values.isnan(), want.isnan())
    assert torch.equal(values.nan_to_num().view(torch.int32), want.nan_to_num().view(torch.int32))


def test_all_of_half_precision_and_each_neighbour_of_a_tie_encode_as_torch_does() -> None:
    halves = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    finite = torch.arange(127, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn).float()
    ties = (finite[1:] + finite[:-1]) / 2
    near = torch.cat([ties, ties.nextafter(torch.tensor(0.0)), ties.nextafter(torch.tensor(1e9)), finite])
    values = torch.cat([halves, near, -near, torch.tensor([1e-30, 1e-40, -0.0, 448.0, -448.0])])
    values = values[values.abs() <= 448.0]
    count = 1 << 12
    padded = torch.zeros(-(-len(values) // count) * count)
    padded[: len(values)] = values
    codes = torch.empty(len(padded), dtype=torch.uint8)
    encode[(len(padded) // count,)](padded, codes, count)
    assert torch.equal(codes, padded.to(torch.float8_e4m3fn).view(torch.uint8))


def pool(num_blocks: int, block_size: int, num_heads: int, head_dim: int, code: torch.dtype) -> list[Tensor]:
    """Codes and scales full of poison: what no token is written to must stay."""
    shape = (num_blocks, 2, block_size, num_heads, head_dim)
    codes = torch.randint(0, 256, shape, dtype=torch.int32).to(torch.uint8)
    return [codes.view(code), torch.randn(shape[:-1])]


@settings(deadline=None, max_examples=100, phases=[Phase.generate])  # to shrink a case takes minutes
@given(
    code=st.sampled_from(FORMATS),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    block_size=st.sampled_from([1, 3, 16]),
    num_heads=st.integers(1, 3),
    head_dim=st.sampled_from([1, 8, 24, 128]),
    num_tokens=st.integers(0, 40),
    magnitude=st.sampled_from([1.0, 1e-3, 300.0, 0.0]),
    head_major=st.booleans(),
    skipped=st.sampled_from([0.0, 0.3]),
    signalled=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_scatter_and_gather_equal_plain_torch_in_every_byte(
    code: torch.dtype,
    dtype: torch.dtype,
    block_size: int,
    num_heads: int,
    head_dim: int,
    num_tokens: int,
    magnitude: float,
    head_major: bool,
    skipped: float,
    signalled: bool,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (num_heads, num_tokens) if head_major else (num_tokens, num_heads)
    key, value = (torch.randn(2, *shape, head_dim, generator=generator) * magnitude).to(dtype)
    if head_major:
        key, value = key.transpose(0, 1), value.transpose(0, 1)
    num_blocks = 40 // block_size + 2
    slots = random_slots(num_tokens, num_blocks * block_size, skipped, generator)
    want = pool(num_blocks, block_size, num_heads, head_dim, code)
    got = [tensor.clone() for tensor in want]
    signal = None
    if signalled:
        signal = ArrivalSignal(torch.zeros(1).long(), 3 << 40, torch.zeros(1).int())
    launch_scatter(key, value, slots, got[0], got[1], signal)
    quantize_scatter(key, value, slots, want[0], want[1])
    assert torch.equal(got[0].view(torch.uint8), want[0].view(torch.uint8))
    assert torch.equal(got[1], want[1])
    if signal is not None:
        assert signal.words.tolist() == [3 << 40]
        assert signal.counters.tolist() == [0]

    if dtype == torch.bfloat16:
        dtype = torch.float32
    rows = torch.zeros(2, num_tokens, num_heads, head_dim, dtype=dtype)
    launch_gather(got[0], got[1], slots, rows[0], rows[1])
    expected = torch.stack(dequantize_gather(want[0], want[1], slots, dtype))
    assert torch.equal(rows, expected)


@pytest.mark.parametrize("code", FORMATS)
def test_one_signal_a_launch_whatever_the_grid(code: torch.dtype) -> None:
    """Many programs, the same counter again: it is 0 after each launch."""
    key, value = torch.randn(2, 300, 2, 128)
    codes, scales = pool(20, 16, 2, 128, code)
    counters = torch.zeros(1, dtype=torch.int32)
    words = torch.zeros(1, dtype=torch.int64)
    for sequence in (1, 2, 1 << 50):
        launch_scatter(key, value, torch.arange(300), codes, scales, ArrivalSignal(words, sequence, counters))
        assert (words.item(), counters.item()) == (sequence, 0)
