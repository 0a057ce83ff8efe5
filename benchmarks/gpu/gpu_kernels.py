"""What the kernels reach on a GPU, against ceilings measured in the same run.

    python benchmarks/gpu/gpu_kernels.py [--tokens 3000] [--rounds 200] [--quick]

One line per row of the table: what ran, its median time on the device, its rate, and its share of the
ceiling. Rates count bytes read and written. Data changes place every round, so that the L2 cache serves
neither the kernels nor the ceilings. Where there is no GPU it says so and measures nothing.

    copy        one device-to-device copy of as many bytes: the ceiling of scatter and put
    read        a sum over a buffer far larger than the L2 cache: the ceiling of decode attention
    scatter     K and V of a Llama-3.1-8B layer from behind RoPE into blocks, with the signal in the launch
    put         the same bytes, as whole blocks between two pools
    quantise    the same rows to e4m3 codes and scales
    decode      paged attention, 32 query and 8 KV heads of 128, bf16, one new token each
    FlashInfer  the same by FlashInfer, if it is installed

Behind a row that has a goal stands whether it was met: scatter at 85 % of the copy in at most 3 launches,
decode at 80 % of the read and as fast as FlashInfer. Exit code 0 also where a goal is missed; 1 if something
fails.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import argparse
import importlib
import importlib.util
import random
import sys
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from gpu_parts import timing
from gpu_parts.table import Goal, in_unit
from gpu_parts.timing import CEILING_NBYTES, Run
from torch import Tensor

from microserve.kernels.attention.gpu_attention import DeviceBatch, paged_attention
from microserve.kernels.cuda_module import Launch
from microserve.kernels.kernel_cache import KernelUnavailable
from microserve.kernels.scatter.arrival_signal import ArrivalSignal
from microserve.kernels.scatter.block_put import block_put, put_plan
from microserve.kernels.scatter.block_scatter import block_scatter

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE = 32, 8, 128, 16
ROW_NBYTES = NUM_KV_HEADS * HEAD_DIM * 2
DECODE_POOL_NBYTES = 16 << 30
SHAPES = [
    *((1, 1024), (1, 32768), (16, 4096), (16, 32768)),
    *((64, 1024), (64, 8192), (256, 1024), (256, 8192), (256, 32768)),
]
"""(sequences, tokens of each); the KV of the last takes 32 GiB."""
QUICK_SHAPES = [(1, 1024), (4, 512)]
SCATTER_GOAL, DECODE_GOAL = Goal(">=", 0.85, "%"), Goal(">=", 0.80, "%")
LAUNCHES_GOAL, FLASHINFER_GOAL = Goal("<=", 3.0, "launches"), Goal(">=", 1.0, "x")


@dataclass(frozen=True)
class Setting:
    device: torch.device
    num_tokens: int
    rounds: int
    places: int
    """Copies of the data, one after the other in use."""

    @property
    def num_blocks(self) -> int:
        return -(-self.num_tokens // BLOCK_SIZE)


def seconds(setting: Setting, run: Run) -> float:
    return timing.seconds(setting.device, setting.rounds, run)


def report(
    what: str, elapsed_s: float, nbytes: int, ceiling: float | None = None, goal: Goal | None = None
) -> float:
    rate = nbytes / elapsed_s
    share = "" if ceiling is None else f"  {rate / ceiling:6.1%} of the ceiling"
    verdict = "" if ceiling is None or goal is None else f"  {said(goal, rate / ceiling)}"
    print(f"{what:44} {elapsed_s * 1e6:9.1f} us  {rate / 1e9:8.1f} GB/s{share}{verdict}", flush=True)
    return rate


def judge(what: str, found: float, goal: Goal) -> None:
    print(f"{what:44} {in_unit(found, goal.unit)}  {said(goal, found)}", flush=True)


def said(goal: Goal, found: float) -> str:
    return f"{'met' if goal.is_met(found) else 'missed'} ({goal})"


def count_launches(run: Run) -> int:
    """Kernels of ours that one round launches."""
    counted = 0
    enqueue = Launch.enqueue

    def counting(launch: Launch, device: torch.device) -> None:
        nonlocal counted
        counted += 1
        enqueue(launch, device)

    with patch.object(Launch, "enqueue", counting):
        run(0)
    return counted


def transfers(setting: Setting) -> None:
    """Rows of the table on scatter and put, for K and V of one layer."""
    device, places = setting.device, range(setting.places)
    rows_nbytes = 2 * setting.num_tokens * ROW_NBYTES

    def pools() -> list[Tensor]:
        shape = (setting.num_blocks, 2, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM)
        return [torch.zeros(shape, dtype=torch.bfloat16, device=device) for _ in places]

    def rows() -> list[Tensor]:
        shape = (2, setting.num_tokens, NUM_KV_HEADS, HEAD_DIM)
        return [torch.randn(shape, device=device).bfloat16() for _ in places]

    sources, targets, new = pools(), pools(), rows()
    flat = [torch.empty_like(tensor) for tensor in new]
    slots = torch.randperm(setting.num_blocks * BLOCK_SIZE, device=device)[: setting.num_tokens]
    words = torch.zeros(1, dtype=torch.int64, device=device)
    counters = torch.zeros(1, dtype=torch.int32, device=device)
    signal = ArrivalSignal(words, 1, counters)

    def at(round_: int) -> int:
        return round_ % setting.places

    copied = seconds(setting, lambda round_: flat[at(round_)].copy_(new[at(round_)]))
    ceiling = report(f"copy, {setting.num_tokens} tokens", copied, 2 * rows_nbytes)

    def scatter(limit: int | None) -> Run:
        return lambda round_: block_scatter(
            *(new[at(round_)][0], new[at(round_)][1], slots, targets[at(round_)]),
            signal=signal,
            max_thread_blocks=limit,
        )

    for limit in (None, 264, 132, 32, 16):
        name = f"scatter + signal, {limit or 'all'} thread blocks"
        goal = SCATTER_GOAL if limit is None else None
        report(name, seconds(setting, scatter(limit)), 2 * rows_nbytes, ceiling, goal)
    if device.type == "cuda":
        judge("scatter + signal, a layer", count_launches(scatter(None)), LAUNCHES_GOAL)

    chance = random.Random(1)
    order = chance.sample(range(setting.num_blocks), setting.num_blocks)
    block_nbytes = 2 * BLOCK_SIZE * ROW_NBYTES
    ranges = [(a * block_nbytes, b * block_nbytes, block_nbytes) for a, b in enumerate(order)]
    plan = put_plan(ranges, device)
    put = seconds(
        setting, lambda round_: block_put(sources[at(round_)], targets[at(round_)], plan, signal=signal)
    )
    report("put of whole blocks + signal", put, 2 * setting.num_blocks * block_nbytes, ceiling)


def read_rate(setting: Setting, nbytes: int) -> float:
    elapsed = timing.read_seconds(setting.device, setting.rounds, nbytes)
    return report(f"read, {nbytes >> 20} MiB", elapsed, nbytes)


def decode(setting: Setting, batch_size: int, context_len: int, pool_blocks: int, ceiling: float) -> None:
    """One shape of decode attention; its blocks are spread over a pool that no cache holds."""
    device = setting.device
    num_blocks = context_len // BLOCK_SIZE
    pool_blocks = max(pool_blocks, batch_size * num_blocks)
    shape = (pool_blocks, 2, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM)
    kv = torch.empty(shape, dtype=torch.bfloat16, device=device).normal_()
    query = torch.randn(batch_size, NUM_HEADS, HEAD_DIM, device=device).bfloat16()
    sets = min(setting.places, pool_blocks // (batch_size * num_blocks))
    blocks = torch.randperm(pool_blocks, device=device)[: sets * batch_size * num_blocks].int()
    tables = blocks.view(sets, batch_size, num_blocks)
    starts = torch.arange(batch_size + 1, device=device).int()
    contexts = torch.full((batch_size,), context_len, device=device).int()
    batches = [DeviceBatch(starts, contexts, tables[index], batch_size) for index in range(sets)]
    out = torch.empty_like(query)
    scale = HEAD_DIM**-0.5
    nbytes = batch_size * context_len * 2 * ROW_NBYTES + 2 * query.nbytes
    name = f"batch {batch_size}, context {context_len}"

    def attend(round_: int) -> object:
        return paged_attention(query, kv, batches[round_ % sets], scale=scale, out=out)

    rate = report(f"decode, {name}", seconds(setting, attend), nbytes, ceiling, DECODE_GOAL)
    if importlib.util.find_spec("flashinfer") is not None and device.type == "cuda":
        run = flashinfer_run(query, kv, tables, context_len)
        theirs = report(f"FlashInfer, {name}", seconds(setting, run), nbytes, ceiling)
        judge("decode against FlashInfer", rate / theirs, FLASHINFER_GOAL)
        expected = paged_attention(query, kv, batches[0], scale=scale)
        torch.testing.assert_close(run(0), expected, atol=3e-2, rtol=3e-2)


def flashinfer_run(query: Tensor, kv: Tensor, tables: Tensor, context_len: int) -> Any:
    """Its planning is left out of the time: an engine plans once for all layers."""
    flashinfer: Any = importlib.import_module("flashinfer")
    sets, batch_size, num_blocks = tables.shape
    indptr = torch.arange(batch_size + 1, dtype=torch.int32) * num_blocks
    last = torch.full((batch_size,), (context_len - 1) % BLOCK_SIZE + 1, dtype=torch.int32)
    wrappers = []
    for index in range(sets):
        workspace = torch.empty(128 << 20, dtype=torch.uint8, device=query.device)
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
        wrapper.plan(
            *(indptr, tables[index].reshape(-1), last, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE),
            q_data_type=query.dtype,
            kv_data_type=kv.dtype,
        )
        wrappers.append(wrapper)
    return lambda round_: wrappers[round_ % sets].run(query, kv)


def measure(setting: Setting, shapes: list[tuple[int, int]], pool_blocks: int, ceiling_nbytes: int) -> None:
    transfers(setting)
    ceiling = read_rate(setting, ceiling_nbytes)
    for batch_size, context_len in shapes:
        decode(setting, batch_size, context_len, pool_blocks, ceiling)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, default=3000, help="tokens of one transfer")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--quick", action="store_true", help="few rounds of small shapes")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("gpu_kernels: no CUDA device: nothing is measured")
        return 0
    device = torch.device("cuda", torch.cuda.current_device())
    print(timing.describe(device))
    setting = Setting(device, options.tokens, 5 if options.quick else options.rounds, places=16)
    shapes, pool_nbytes = (QUICK_SHAPES, 1 << 30) if options.quick else (SHAPES, DECODE_POOL_NBYTES)
    pool_blocks = pool_nbytes // (2 * BLOCK_SIZE * ROW_NBYTES)
    try:
        measure(setting, shapes, pool_blocks, CEILING_NBYTES)
    except KernelUnavailable as error:
        print(f"gpu_kernels: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
