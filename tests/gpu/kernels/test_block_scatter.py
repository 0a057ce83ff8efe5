"""Block scatter on a GPU: every byte against the oracle, into poisoned pools, with and without a signal."""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from microserve.kernels import cuda_module, reference
from microserve.kernels.scatter.arrival_signal import ArrivalSignal
from microserve.kernels.scatter.block_scatter import block_scatter
from tests.support.engine.device.kernel_cases import random_slots
from tests.support.engine.device.pairwise import pairwise


def poisoned(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Random bytes, NaNs among them: what is left of them is compared too."""
    nbytes = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(0, 256, (nbytes,), generator=generator).to(torch.uint8).view(dtype).view(shape)


def by_triton(key: Tensor, value: Tensor, slots: Tensor, layer: Tensor) -> None:
    pytest.importorskip("triton", reason="no triton")
    from microserve.kernels.scatter.triton_scatter import launch_scatter

    launch_scatter(key, value, slots, layer)


DTYPES = [torch.float16, torch.bfloat16, torch.float32]
SHAPES = [(8, 128), (3, 64), (1, 80), (2, 3), (1, 1)]
CASES = pairwise(DTYPES, SHAPES, [0, 1, 37, 3000], ["contiguous", "packed", "head major"])


@pytest.mark.parametrize(("dtype", "shape", "num_tokens", "view"), CASES)
@pytest.mark.parametrize("scatter", [block_scatter, by_triton], ids=["cuda", "triton"])
def test_bytes_equal_the_oracle(
    gpu: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, int],
    num_tokens: int,
    view: str,
    scatter: Callable[[Tensor, Tensor, Tensor, Tensor], None],
) -> None:
    num_heads, head_dim = shape
    generator = torch.Generator().manual_seed(num_tokens + head_dim)
    num_blocks = num_tokens // 16 + 3
    laid = (num_heads, num_tokens, head_dim) if view == "head major" else (num_tokens, num_heads, head_dim)
    key, value = torch.randn(2, *laid, generator=generator).to(dtype)
    if view == "head major":
        key, value = key.transpose(0, 1), value.transpose(0, 1)
    slots = random_slots(num_tokens, num_blocks * 16, 0.2, generator)
    want = poisoned((num_blocks, 2, 16, num_heads, head_dim), dtype, generator)
    layer = want.to(gpu)
    inside = torch.where((slots >= 0) & (slots < num_blocks * 16), slots, -1)
    reference.write_kv(want, key, value, inside)
    keys, values = key.to(gpu), value.to(gpu)  # strides are kept
    if view == "packed":
        packed = torch.cat([keys, values], 1)
        keys, values = packed[:, :num_heads], packed[:, num_heads:]
    scatter(keys, values, slots.to(gpu), layer)
    assert torch.equal(layer.cpu().view(torch.uint8), want.view(torch.uint8))


@pytest.mark.parametrize("max_thread_blocks", [None, 1, 16])
def test_the_signal_is_raised_once_a_launch_and_never_before_the_data(
    gpu: torch.device, max_thread_blocks: int | None
) -> None:
    """A second stream waits for each word on the device, and copies the layer as it then is."""
    key, value = torch.empty(2, 3000, 8, 128, dtype=torch.bfloat16, device=gpu)
    slots = torch.randperm(3008, device=gpu)[:3000]
    layer = torch.zeros(188, 2, 16, 8, 128, dtype=torch.bfloat16, device=gpu)
    seen = torch.zeros_like(layer)
    words = torch.zeros(1, dtype=torch.int64, device=gpu)
    counters = torch.zeros(1, dtype=torch.int32, device=gpu)
    cuda_module.load(gpu)
    writer, reader = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    wait = ctypes.CDLL("libcuda.so.1").cuStreamWaitValue64_v2
    wait.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint]
    at_least = 0  # CU_STREAM_WAIT_VALUE_GEQ
    for sequence in range(1, 51):
        with torch.cuda.stream(writer):
            key.fill_(sequence)
            value.fill_(-sequence)
            block_scatter(
                *(key, value, slots, layer),
                signal=ArrivalSignal(words, sequence, counters),
                max_thread_blocks=max_thread_blocks,
            )
        with torch.cuda.stream(reader):
            assert wait(reader.cuda_stream, words.data_ptr(), sequence, at_least) == 0
            seen.copy_(layer)
        torch.cuda.synchronize()
        rows = seen.transpose(1, 2).reshape(3008, 2, -1)[slots]
        assert bool((rows[:, 0] == sequence).all()) and bool((rows[:, 1] == -sequence).all())
        assert (words.item(), counters.item()) == (sequence, 0)


def test_a_launch_is_captured_in_a_graph(gpu: torch.device) -> None:
    key, value = torch.randn(2, 64, 2, 64, device=gpu)
    slots = torch.arange(64, device=gpu)
    layer = torch.zeros(4, 2, 16, 2, 64, device=gpu)
    cuda_module.load(gpu)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        block_scatter(key, value, slots, layer)
    key.normal_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(layer[:, 0].reshape(64, 2, 64), key)
    assert torch.equal(layer[:, 1].reshape(64, 2, 64), value)
