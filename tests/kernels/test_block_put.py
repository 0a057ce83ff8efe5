"""Block put: the kernel's own address arithmetic against plain copies, the CPU path, what is refused."""

from __future__ import annotations

import ctypes
import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from microserve.kernels.scatter.arrival_signal import ArrivalSignal
from microserve.kernels.scatter.block_put import (
    PIECE_NBYTES,
    PutPlan,
    block_put,
    launch_shape,
    put_launch,
    put_plan,
)
from tests.support.engine.device.kernel_cases import declared, emulate

CPU = torch.device("cpu")
PARAMETERS = [name for _, name in declared("block_put")]


def plan(*ranges: tuple[int, int, int]) -> PutPlan:
    return put_plan(ranges, CPU)


@st.composite
def puts(draw: st.DrawFn) -> tuple[list[tuple[int, int, int]], int, int]:
    """(ranges whose targets are apart, bytes of a layer of the source, and of the target)."""
    align = draw(st.sampled_from([1, 2, 4, 16]))
    length = st.integers(1, 40) | st.integers(1000, 1100) if align > 1 else st.integers(1, 40000)
    lengths = [align * number for number in draw(st.lists(length, max_size=5))]
    gaps = [align * draw(st.integers(0, 3)) for _ in lengths]
    ends = list(itertools.accumulate(gap + nbytes for gap, nbytes in zip(gaps, lengths, strict=True)))
    ranges = [
        (align * draw(st.integers(0, 50)), end - nbytes, nbytes)
        for end, nbytes in zip(ends, lengths, strict=True)
    ]
    source_nbytes = max((source + nbytes for source, _, nbytes in ranges), default=0)
    extra = align * draw(st.integers(0, 3))
    return draw(st.permutations(ranges)), source_nbytes + extra, (ends[-1] if ends else 0) + extra


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    put=puts(), num_layers=st.integers(1, 3), max_thread_blocks=st.integers(1, 7), pieces=st.integers(0, 3)
)
def test_every_range_of_every_layer_is_copied_and_no_other_byte(
    host_kernels: ctypes.CDLL,
    put: tuple[list[tuple[int, int, int]], int, int],
    num_layers: int,
    max_thread_blocks: int,
    pieces: int,
) -> None:
    ranges, source_step, target_step = put
    source = torch.randint(0, 256, (num_layers * source_step + 16,), dtype=torch.uint8)
    target = torch.randint(0, 256, (num_layers * target_step + 16,), dtype=torch.uint8)
    want = target.clone()
    for layer in range(num_layers):
        for begin, to, nbytes in ranges:
            at = begin + layer * source_step
            want[to + layer * target_step :][:nbytes] = source[at : at + nbytes]
    work = plan(*ranges)
    on_cpu = target.clone()
    steps = source_step, target_step
    addresses = source.data_ptr(), target.data_ptr()
    launch = put_launch(*addresses, work, num_layers, steps, None, max_thread_blocks)
    if pieces:  # any number must do
        place = PARAMETERS.index("pieces")
        arguments = (*launch.arguments[:place], np.uint32(pieces), *launch.arguments[place + 1 :])
        launch = replace(launch, arguments=arguments)
    emulate(host_kernels.emulate_put, launch)
    assert torch.equal(target, want)
    block_put(
        *(source, on_cpu, work),
        num_layers=num_layers,
        source_layer_nbytes=source_step,
        target_layer_nbytes=target_step,
    )
    assert torch.equal(on_cpu, want)


def test_the_kernel_and_its_launch_agree_on_a_piece(host_kernels: ctypes.CDLL) -> None:
    assert host_kernels.piece_nbytes() == PIECE_NBYTES


def test_the_grid_spreads_long_ranges_and_stays_within_the_device() -> None:
    assert launch_shape(188, 65536, 1000) == (752, 4)
    assert launch_shape(188, 65536, 17) == (17, 4)
    assert launch_shape(0, 0, 17) == (1, 1)  # one block, for the signal


def test_on_a_cpu_each_layer_raises_its_signal_and_any_dtype_is_bytes() -> None:
    source = torch.randn(3, 4, 2, 8).bfloat16()
    target = torch.zeros(3, 6, 2, 8, dtype=torch.bfloat16)
    words, counters = torch.zeros(3, dtype=torch.int64), torch.zeros(8, dtype=torch.int32)
    block_put(
        source,
        target,
        plan((32, 160, 32), (0, 0, 16)),  # block 1 to block 5, and the first half of block 0
        num_layers=3,
        source_layer_nbytes=source[0].nbytes,
        target_layer_nbytes=target[0].nbytes,
        signal=ArrivalSignal(words, 1 << 33, counters),
    )
    want = torch.zeros_like(target)
    want[:, 5] = source[:, 1]
    want[:, 0, 0] = source[:, 0, 0]
    assert torch.equal(target, want)
    assert words.tolist() == [1 << 33] * 3


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ([(-1, 0, 4)], "at least 0"),
        ([(0, -4, 4)], "at least 0"),
        ([(0, 0, 0)], "nbytes at least 1"),
        ([(0, 8, 4), (0, 0, 9)], "the same byte"),
        ([(0, 0, 100), (0, 200, 4), (0, 10, 4)], "the same byte"),
    ],
)
def test_ranges_that_cannot_be_are_refused(ranges: list[tuple[int, int, int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(*ranges)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_layers": 0}, "num_layers 0"),
        ({"num_layers": 1 << 16}, "num_layers 65536"),
        ({"max_thread_blocks": 0}, "max_thread_blocks 0"),
        ({"source": torch.zeros(4, 4).mT}, "source is not contiguous"),
        (
            {"source": torch.zeros(11, dtype=torch.uint8)},
            "source has 11 bytes, 1 layers of the plan reach 12",
        ),
        (
            {"target": torch.zeros(19, dtype=torch.uint8)},
            "target has 19 bytes, 1 layers of the plan reach 20",
        ),
        ({"target": torch.zeros(99, dtype=torch.uint8, device="meta")}, "target is on meta, the plan on cpu"),
        ({"source_layer_nbytes": -1}, "source_layer_nbytes -1"),
        ({"num_layers": 2, "source_layer_nbytes": 90, "target_layer_nbytes": 20}, "source has 99 bytes"),
        ({"num_layers": 2, "target_layer_nbytes": 19}, "target_layer_nbytes 19"),
        (
            {
                "signal": ArrivalSignal(
                    torch.zeros(2, dtype=torch.int64), 1, torch.zeros(2, dtype=torch.int32)
                )
            },
            r"signal.words is torch.int64 \(2,\), int64 \[1\] needed",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    memory = {"source": torch.zeros(99, dtype=torch.uint8), "target": torch.zeros(99, dtype=torch.uint8)}
    with pytest.raises(ValueError, match=message):
        block_put(**({"plan": plan((8, 16, 4))} | memory | arguments))
