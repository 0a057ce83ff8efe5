"""Block put on a GPU: whole blocks and odd ranges, all layers at once, every byte and every signal."""

from __future__ import annotations

import random

import pytest
import torch

from microserve.kernels.scatter.arrival_signal import ArrivalSignal
from microserve.kernels.scatter.block_put import block_put, put_plan


@pytest.mark.parametrize("align", [1, 2, 4, 16])
@pytest.mark.parametrize("num_layers", [1, 5])
@pytest.mark.parametrize("max_thread_blocks", [None, 1])
def test_bytes_equal_plain_copies(
    gpu: torch.device, align: int, num_layers: int, max_thread_blocks: int | None
) -> None:
    chance = random.Random(align)
    target_at, ranges = 0, []
    for _ in range(40):
        nbytes = align * chance.randint(1, 5000)
        target_at += align * chance.randint(0, 5)
        ranges.append((align * chance.randint(0, 5000), target_at, nbytes))
        target_at += nbytes
    chance.shuffle(ranges)
    source_step = 16 * (max(begin + nbytes for begin, _, nbytes in ranges) // 16 + 1)
    target_step = 16 * (target_at // 16 + 1)
    source = torch.randint(0, 256, (num_layers * source_step,)).to(torch.uint8)
    target = torch.randint(0, 256, (num_layers * target_step,)).to(torch.uint8)
    on_gpu = target.to(gpu)
    words = torch.zeros(num_layers, dtype=torch.int64, device=gpu)
    counters = torch.zeros(num_layers, dtype=torch.int32, device=gpu)
    for memory, device in ((target, torch.device("cpu")), (on_gpu, gpu)):
        signal = ArrivalSignal(words, 9, counters) if memory is on_gpu else None
        block_put(
            *(source.to(device), memory, put_plan(ranges, device)),
            num_layers=num_layers,
            source_layer_nbytes=source_step,
            target_layer_nbytes=target_step,
            signal=signal,
            max_thread_blocks=max_thread_blocks,
        )
    assert torch.equal(on_gpu.cpu(), target)
    assert words.tolist() == [9] * num_layers
    assert counters.tolist() == [0] * num_layers


def test_no_ranges_still_signal_every_layer(gpu: torch.device) -> None:
    memory = torch.zeros(64, dtype=torch.uint8, device=gpu)
    words = torch.zeros(3, dtype=torch.int64, device=gpu)
    counters = torch.zeros(3, dtype=torch.int32, device=gpu)
    signal = ArrivalSignal(words, 2, counters)
    block_put(memory, memory.clone(), put_plan([], gpu), num_layers=3, signal=signal)
    assert words.tolist() == [2, 2, 2]
