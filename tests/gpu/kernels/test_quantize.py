"""Triton quantisation on a GPU: every byte equals plain torch on a CPU, which casts to e4m3 by itself."""

from __future__ import annotations

import pytest
import torch

from microserve.kernels.quantize.kv_quantize import dequantize_gather, quantize_scatter
from microserve.kernels.scatter.arrival_signal import ArrivalSignal
from tests.support.engine.device.kernel_cases import random_slots

pytest.importorskip("triton", reason="no triton")


@pytest.mark.parametrize("code", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("num_heads", "head_dim"), [(8, 128), (3, 64), (1, 80)])
@pytest.mark.parametrize("num_tokens", [0, 1, 2000])
def test_bytes_equal_plain_torch(
    gpu: torch.device, code: torch.dtype, dtype: torch.dtype, num_heads: int, head_dim: int, num_tokens: int
) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    key, value = torch.randn(2, num_tokens, num_heads, head_dim, generator=generator).to(dtype)
    num_blocks = num_tokens // 16 + 2
    slots = random_slots(num_tokens, num_blocks * 16, 0.2, generator)
    shape = (num_blocks, 2, 16, num_heads, head_dim)
    codes = torch.randint(0, 256, shape, generator=generator).to(torch.uint8).view(code)
    scales = torch.randn(shape[:-1], generator=generator)
    got_codes, got_scales = codes.to(gpu), scales.to(gpu)
    words = torch.zeros(1, dtype=torch.int64, device=gpu)
    counters = torch.zeros(1, dtype=torch.int32, device=gpu)
    quantize_scatter(
        *(key.to(gpu), value.to(gpu), slots.to(gpu), got_codes, got_scales),
        signal=ArrivalSignal(words, 1 << 40, counters),
    )
    quantize_scatter(key, value, slots, codes, scales)
    assert torch.equal(got_codes.cpu().view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(got_scales.cpu(), scales)
    assert (words.item(), counters.item()) == (1 << 40, 0)
    got = dequantize_gather(got_codes, got_scales, slots.to(gpu), dtype)
    want = dequantize_gather(codes, scales, slots, dtype)
    for ours, theirs in zip(got, want, strict=True):
        assert torch.equal(ours.cpu(), theirs)
