"""KV in 8 bits: the stated error bounds, the CPU path against single rows, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from microserve.kernels.quantize.kv_quantize import (
    GREATEST_CODE,
    dequantize,
    dequantize_gather,
    quantize,
    quantize_scatter,
)
from microserve.kernels.scatter.arrival_signal import ArrivalSignal
from tests.support.engine.device.kernel_cases import random_slots

FORMATS = [torch.int8, torch.float8_e4m3fn]
finite = st.floats(-1e4, 1e4, width=32) | st.floats(-(2**-10), 2**-10, width=32)


@settings(deadline=None, max_examples=200)
@given(row=st.lists(finite, min_size=1, max_size=32), code=st.sampled_from(FORMATS))
def test_a_round_trip_stays_within_the_stated_bound(row: list[float], code: torch.dtype) -> None:
    values = torch.tensor(row)
    codes, scale = quantize(values, code)
    back = dequantize(codes, scale, torch.float32)
    assert scale > 0
    absmax = values.abs().max()
    if absmax <= 1e-30:
        assert not back.any()
        return
    assert codes.float().abs().max() == GREATEST_CODE[code]
    slack = 1 + 1e-6
    if code == torch.int8:
        bound = scale / 2 * slack * torch.ones_like(values)
    else:
        bound = torch.maximum(values.abs() / 16, scale * 2**-10) * slack
    assert bool(((back - values).abs() <= bound).all())


@settings(deadline=None)
@given(
    code=st.sampled_from(FORMATS),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    block_size=st.sampled_from([1, 3, 16]),
    num_tokens=st.integers(0, 20),
    skipped=st.sampled_from([0.0, 0.5]),
    seed=st.integers(0, 2**32),
)
def test_rows_land_in_their_slots_and_come_back(
    code: torch.dtype, dtype: torch.dtype, block_size: int, num_tokens: int, skipped: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    key, value = torch.randn(2, num_tokens, 2, 8, generator=generator).to(dtype)
    num_blocks = 20 // block_size + 2
    slots = random_slots(num_tokens, num_blocks * block_size, skipped, generator)
    codes = torch.zeros(num_blocks, 2, block_size, 2, 8).to(code)
    scales = torch.full((num_blocks, 2, block_size, 2), float("nan"))
    signal = ArrivalSignal(torch.zeros(1).long(), 7, torch.zeros(1).int())
    quantize_scatter(key, value, slots, codes, scales, signal=signal)
    assert signal.words.tolist() == [7]
    got_key, got_value = dequantize_gather(codes, scales, slots, dtype)
    num_written = 0
    for token, slot in enumerate(slots.tolist()):
        for rows, got, half in ((key, got_key, 0), (value, got_value, 1)):
            want = torch.zeros_like(rows[token])
            if 0 <= slot < num_blocks * block_size:
                row_codes, row_scales = quantize(rows[token], code)
                block, row = divmod(slot, block_size)
                assert torch.equal(codes[block, half, row].float(), row_codes.float())
                assert torch.equal(scales[block, half, row], row_scales)
                want = dequantize(row_codes, row_scales, dtype)
                num_written += 1
            assert torch.equal(got[token], want)
    assert int((~scales.isnan()).sum()) == num_written * 2


@pytest.mark.parametrize("operation", ["scatter", "gather"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codes": torch.zeros(3, 1, 4, 2, 8).char()}, "codes is"),
        ({"codes": torch.zeros(3, 2, 4, 2, 16).char()[..., ::2]}, "codes is .* contiguous"),
        ({"codes": torch.zeros(3, 2, 4, 2, 8)}, "codes is torch.float32, one of"),
        ({"scales": torch.zeros(3, 2, 4, 2).half()}, "scales is torch.float16"),
        ({"scales": torch.zeros(3, 2, 4, 1)}, "scales is"),
        ({"scales": torch.zeros(3, 2, 4, 2, device="meta")}, "scales is on meta"),
        ({"slots": torch.zeros(5).int()}, "slots is torch.int32"),
        ({"slots": torch.zeros(10).long()[::2]}, "slots is .* contiguous"),
        ({"slots": torch.zeros(5, device="meta").long()}, "slots is on meta"),
    ],
)
def test_pools_and_slots_that_do_not_fit_are_refused(
    operation: str, changes: dict[str, Any], message: str
) -> None:
    work: dict[str, Any] = {
        "codes": torch.zeros(3, 2, 4, 2, 8).char(),
        "scales": torch.zeros(3, 2, 4, 2),
        "slots": torch.arange(5),
    } | changes
    with pytest.raises(ValueError, match=message):
        if operation == "gather":
            dequantize_gather(**work, dtype=torch.float32)
        else:
            quantize_scatter(torch.zeros(5, 2, 8), torch.zeros(5, 2, 8), **work)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key": torch.zeros(5, 2, 4)}, "key is"),
        ({"key": torch.zeros(5, 2, 8).double()}, "key is torch.float64"),
        ({"value": torch.zeros(4, 2, 8)}, "value is"),
        ({"value": torch.zeros(5, 2, 8).half()}, "value is torch.float16"),
        ({"value": torch.zeros(5, 8, 2).mT}, "value has strides"),
        ({"value": torch.zeros(5, 2, 8, device="meta")}, "value is on meta"),
    ],
)
def test_rows_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    rows: dict[str, Any] = {"key": torch.zeros(5, 2, 8), "value": torch.zeros(5, 2, 8)} | changes
    codes, scales = torch.zeros(3, 2, 4, 2, 8).char(), torch.zeros(3, 2, 4, 2)
    with pytest.raises(ValueError, match=message):
        quantize_scatter(slots=torch.arange(5), codes=codes, scales=scales, **rows)


def test_a_dtype_that_rows_cannot_have_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dtype is torch\.float64"):
        dequantize_gather(
            torch.zeros(3, 2, 4, 2, 8).char(), torch.zeros(3, 2, 4, 2), torch.arange(5), torch.float64
        )
