"""The native step with nothing around it, as a child of a benchmark: ``peers.py`` says what comes and goes.

Prompts in chunks of as many tokens as an engine takes in a step, then one token of each sequence a step, the
likeliest one. No scheduler, no cache, no sampler, no socket.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import torch

from microserve.kernels.cpu.step import CpuStep
from microserve.services.engine.model.model import load_model
from microserve.services.engine.native.packing import native_runner

NUM_BLOCKS, BLOCK_SIZE, MAX_ROWS = 2048, 16, 512


def _step(step: CpuStep, rows: list[tuple[list[int], int, list[int]]]) -> list[int]:
    """One step of (tokens, first position, blocks): the likeliest next token of each."""
    positions = [np.arange(start, start + len(tokens)) for tokens, start, _ in rows]
    slots = [
        np.array(table)[at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE
        for at, (_, _, table) in zip(positions, rows, strict=True)
    ]
    logits = step.run(
        np.concatenate([np.array(tokens) for tokens, _, _ in rows]),
        np.concatenate(positions),
        np.concatenate(slots),
        [(len(tokens), start + len(tokens), table) for tokens, start, table in rows],
        np.cumsum([len(tokens) for tokens, _, _ in rows]) - 1,
        None,
    )
    return [int(token) for token in logits.argmax(-1)]


def _generate(step: CpuStep, prompts: list[list[int]], num_tokens: int) -> list[list[float]]:
    began = time.perf_counter()
    width = -(-(max(map(len, prompts)) + num_tokens) // BLOCK_SIZE)
    tables = [list(range(each * width, (each + 1) * width)) for each in range(len(prompts))]
    times: list[list[float]] = [[] for _ in prompts]
    last = [0] * len(prompts)
    at_once = max(1, MAX_ROWS // max(map(len, prompts)))
    for begin in range(0, len(prompts), at_once):
        some = range(begin, min(begin + at_once, len(prompts)))
        for each, token in zip(some, _step(step, [(prompts[i], 0, tables[i]) for i in some]), strict=True):
            last[each] = token
            times[each].append(time.perf_counter() - began)
    for count in range(num_tokens - 1):
        rows = [([token], len(p) + count, t) for token, p, t in zip(last, prompts, tables, strict=True)]
        last = _step(step, rows)
        now = time.perf_counter() - began
        for seen in times:
            seen.append(now)
    return times


def main() -> None:
    directory, threads, dtype = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(threads)
    model = load_model(directory, dtype=dtype)
    spec = model.spec
    elements = spec.num_layers * NUM_BLOCKS * 2 * BLOCK_SIZE * spec.num_kv_heads * spec.head_dim
    pool = np.zeros(elements * (2 if dtype == "bfloat16" else 4), np.uint8)
    runner = native_runner(model, pool, NUM_BLOCKS, BLOCK_SIZE, threads=threads, max_rows=MAX_ROWS)
    step = runner.step
    print(json.dumps({"version": runner.numerics.name}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps({"times": _generate(step, asked["prompts"], asked["num_tokens"])}), flush=True)


if __name__ == "__main__":
    main()
