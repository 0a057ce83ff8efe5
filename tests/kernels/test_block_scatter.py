"""Block scatter: the kernel's own address arithmetic against the oracle, the CPU path, what is refused."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from microserve.kernels import reference
from microserve.kernels.scatter.arrival_signal import ArrivalSignal
from microserve.kernels.scatter.block_scatter import block_scatter, launch_shape, row_shape, scatter_launch
from tests.support.engine.device.kernel_cases import emulate, random_slots

GUARD = 64  # elements before and after the pool that nothing may touch

views = st.sampled_from(["contiguous", "packed", "head major", "misaligned"])
dtypes = st.sampled_from([torch.float16, torch.bfloat16, torch.float32])


def rows(view: str, num_tokens: int, num_heads: int, head_dim: int, generator: torch.Generator) -> Tensor:
    """[num_tokens, num_heads, head_dim] fp32 laid out as models do, and worse."""
    if view == "packed":  # one matrix product for query, key and value
        packed = torch.randn(num_tokens, (num_heads + 2) * head_dim, generator=generator)
        return packed[:, head_dim : (num_heads + 1) * head_dim].view(num_tokens, num_heads, head_dim)
    if view == "head major":
        return torch.randn(num_heads, num_tokens, head_dim, generator=generator).transpose(0, 1)
    if view == "misaligned":
        flat = torch.randn(num_tokens * num_heads * head_dim + 1, generator=generator)
        return flat[1:].view(num_tokens, num_heads, head_dim)
    return torch.randn(num_tokens, num_heads, head_dim, generator=generator)


def as_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Converted with its strides and its offset kept."""
    storage = torch.empty(0).set_(tensor.untyped_storage()).to(dtype)
    return storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def inside(slots: Tensor, layer: Tensor) -> Tensor:
    return torch.where((slots >= 0) & (slots < layer.shape[0] * layer.shape[2]), slots, -1)


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    view=st.tuples(views, views),
    dtype=dtypes,
    block_size=st.sampled_from([1, 3, 16]),
    num_heads=st.integers(1, 3),
    head_dim=st.sampled_from([1, 3, 8, 64, 80, 300]),
    num_tokens=st.integers(0, 40),
    skipped=st.sampled_from([0.0, 0.3, 1.0]),
    max_thread_blocks=st.integers(1, 5),
    seed=st.integers(0, 2**32),
)
def test_every_thread_writes_its_own_bytes_and_no_other(
    host_kernels: ctypes.CDLL,
    view: tuple[str, str],
    dtype: torch.dtype,
    block_size: int,
    num_heads: int,
    head_dim: int,
    num_tokens: int,
    skipped: float,
    max_thread_blocks: int,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    num_blocks = 40 // block_size + 2
    shape = (num_blocks, 2, block_size, num_heads, head_dim)
    key, value = (as_dtype(rows(kind, num_tokens, num_heads, head_dim, generator), dtype) for kind in view)
    slots = random_slots(num_tokens, num_blocks * block_size, skipped, generator)
    numel = torch.Size(shape).numel()
    guarded = torch.randn(numel + 2 * GUARD, generator=generator).to(dtype)
    want = guarded.clone()
    layer = guarded[GUARD : GUARD + numel].view(shape)
    expected = want[GUARD : GUARD + numel].view(shape)
    reference.write_kv(expected, key, value, inside(slots, expected))
    launch = scatter_launch(key, value, slots, layer, None, max_thread_blocks)
    unit = int(launch.entry.removeprefix("block_scatter_"))
    emulate(host_kernels.emulate_scatter, launch, unit)
    assert torch.equal(guarded.view(torch.uint8), want.view(torch.uint8))


@given(block=st.integers(0, 1 << 20), row=st.integers(0, 1023), block_size=st.integers(1, 1024))
def test_a_slot_is_the_row_that_the_pool_has_for_it(
    host_kernels: ctypes.CDLL, block: int, row: int, block_size: int
) -> None:
    """Against the layout in words: K rows of a block, then its V rows."""
    row %= block_size
    slot = block * block_size + row
    got = host_kernels.emulate_key_row(ctypes.c_uint32(slot), ctypes.c_uint32(block_size))
    assert got == block * 2 * block_size + row


@pytest.mark.parametrize(
    ("num_heads", "head_dim", "dtype", "unit"),
    [
        (8, 128, torch.bfloat16, 16),
        (3, 64, torch.float32, 16),
        (1, 80, torch.float16, 16),
        (3, 24, torch.bfloat16, 16),  # a row of 144 bytes
        (1, 6, torch.bfloat16, 4),
        (1, 3, torch.float32, 4),
        (1, 3, torch.bfloat16, 2),
    ],
)
def test_rows_are_copied_in_the_widest_unit_that_fits(
    num_heads: int, head_dim: int, dtype: torch.dtype, unit: int
) -> None:
    key, value = torch.zeros(2, 5, num_heads, head_dim, dtype=dtype)
    # Of the second half of one allocation only the row, not the start, decides.
    shape = row_shape(key, value.clone(), 0)
    assert (shape.unit, shape.num_heads, shape.head_nbytes) == (unit, 1, num_heads * key[0, 0].nbytes)


def test_the_grid_covers_a_long_prompt_without_exceeding_the_device() -> None:
    # 3,000 tokens of a Llama-3.1-8B layer: 128 units of 16 bytes a row.
    assert launch_shape(3000, 128, 1056) == ((750,), (128, 2))
    assert launch_shape(32000, 128, 1056) == ((1056,), (128, 2))
    assert launch_shape(0, 128, 1056) == ((1,), (128, 2))  # one block, for the signal
    assert launch_shape(10, 1000, 1056) == ((5,), (256, 1))


def sample(num_tokens: int = 5, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(7)
    key, value = torch.randn(2, num_tokens, 2, 8, generator=generator).to(dtype)
    return {
        "key": key,
        "value": value,
        "slots": torch.tensor([7, -1, 0, 11, 99])[:num_tokens],
        "layer": torch.randn(3, 2, 4, 2, 8, generator=generator).to(dtype),
    }


def signal(value: int = 5) -> ArrivalSignal:
    return ArrivalSignal(torch.zeros(1, dtype=torch.int64), value, torch.zeros(1, dtype=torch.int32))


def test_on_a_cpu_rows_are_written_and_the_signal_is_raised() -> None:
    work, arrival = sample(), signal(1 << 40)
    want = work["layer"].clone()
    reference.write_kv(want, work["key"], work["value"], inside(work["slots"], want))
    block_scatter(**work, signal=arrival)
    assert torch.equal(work["layer"], want)
    assert arrival.words.tolist() == [1 << 40]
    assert arrival.counters.tolist() == [0]


def test_a_signal_is_raised_for_no_tokens_too() -> None:
    arrival = signal()
    block_scatter(**sample(0), signal=arrival)
    assert arrival.words.tolist() == [5]


Change = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda work: work.update(layer=work["layer"][:, :1]), "layer is"),
        (lambda work: work.update(layer=work["layer"].transpose(2, 3)), "layer is not contiguous"),
        (lambda work: work.update(layer=work["layer"].double()), "layer is torch.float64"),
        (lambda work: work.update(layer=work["layer"].half()), "key is torch.bfloat16, layer is"),
        (lambda work: work.update(layer=torch.empty(1 << 30, 2, 2, 2, 8, device="meta").half()), "2.31 rows"),
        (lambda work: work.update(key=work["key"][:, :1]), r"key is \(5, 1, 8\), \[5, 2, 8\] is needed"),
        (lambda work: work.update(value=work["value"][:4]), "value is"),
        (lambda work: work.update(value=work["value"].float()), "value is torch.float32"),
        (lambda work: work.update(key=work["key"].mT.contiguous().mT), "key has strides"),
        (lambda work: work.update(key=work["key"].to("meta")), "value is on cpu, key on meta"),
        (lambda work: work.update(slots=work["slots"].int()), "slots is torch.int32"),
        (lambda work: work.update(slots=work["slots"][:3]), "slots is"),
        (lambda work: work.update(slots=torch.zeros(10, dtype=torch.int64)[::2]), "slots is not contiguous"),
        (lambda work: work.update(slots=work["slots"].to("meta")), "slots is on meta"),
        (lambda work: work.update(layer=work["layer"].to("meta")), "layer is on meta"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change: Change, message: str) -> None:
    work = sample()
    change(work)
    with pytest.raises(ValueError, match=message):
        block_scatter(**work)


def test_no_thread_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="max_thread_blocks 0"):
        block_scatter(**sample(), max_thread_blocks=0)


@pytest.mark.parametrize(
    ("arrival", "message"),
    [
        (replace(signal(), words=torch.zeros(2, dtype=torch.int64)), r"signal.words is .* int64 \[1\]"),
        (replace(signal(), words=torch.zeros(1)), "signal.words is torch.float32"),
        (
            replace(signal(), words=torch.zeros(1, dtype=torch.int64, device="meta")),
            "signal.words is on meta",
        ),
        (signal(0), "signal.value 0"),
        (signal(1 << 63), "signal.value"),
        (replace(signal(), counters=torch.zeros(0, dtype=torch.int32)), "at least 1 int32"),
        (replace(signal(), counters=torch.zeros(1, dtype=torch.int64)), "signal.counters is torch.int64"),
        (replace(signal(), counters=torch.zeros(1, dtype=torch.int32, device="meta")), "counters is on meta"),
        (replace(signal(), counters=torch.zeros(4, dtype=torch.int32)[::2]), "counters is not contiguous"),
    ],
)
def test_a_signal_that_does_not_fit_is_refused_and_nothing_written(
    arrival: ArrivalSignal, message: str
) -> None:
    work = sample()
    before = work["layer"].clone()
    with pytest.raises(ValueError, match=message):
        block_scatter(**work, signal=arrival)
    assert torch.equal(work["layer"], before)
