"""What a step of this project's own engine takes, and the constants of a simulation profile fitted to it.

    python benchmarks/step_time.py [--model DIR] [--dtype float32] [--threads 1] [--rounds 5]

Runs steps of several kinds (prefills of many lengths behind many tokens, decodes of several sequences and
contexts, on random blocks of a pool) and prints the least time of each, what the fit says, and the fit:
``services/simulation/load/timing.py`` says what the constants mean. The kinds take turns within a round, and
the least of a kind's rounds counts: other work on the machine can only add to a step's time. The link is what
one put of a whole prompt's KV into another engine's shared memory reaches.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from pathlib import Path

import numpy as np
import torch

from microserve.kvcache.heap.heap import Copies, Copy
from microserve.kvcache.heap.shm import ShmHeap
from microserve.kvcache.layout import KvLayout
from microserve.protocol.messages.sampling import SamplingParams
from microserve.services.engine.core.batch import Batch, Chunk, SampleSpec
from microserve.services.engine.model.model import load_model
from microserve.services.engine.model.runner import ModelRunner
from microserve.services.local.demo_model import default_cache, fetch

NUM_BLOCKS, BLOCK_SIZE = 2048, 16
PREFILLS = [(n, start) for n in (2, 8, 32, 128, 512) for start in (0, 1024, 4096)]
DECODES = [(count, context) for count in (1, 4, 16, 32) for context in (64, 768)]
PUT_TOKENS = 1024
NUM_PUTS = 7


def chunk(number: int, num_tokens: int, start: int, chance: random.Random, *, is_decode: bool) -> Chunk:
    num_blocks = -(-(start + num_tokens) // BLOCK_SIZE)
    tokens = [chance.randrange(1000) for _ in range(num_tokens)]
    spec = SampleSpec(SamplingParams(temperature=0.0), tokens, [1] if is_decode else [], frozenset())
    return Chunk(number, tokens, start, chance.sample(range(NUM_BLOCKS), num_blocks), start, spec)


def steps(chance: random.Random) -> list[tuple[str, Batch, tuple[float, float, float]]]:
    """Each kind: its name, its batch, and (tokens, pairs, contexts)."""
    kinds: list[tuple[str, Batch, tuple[float, float, float]]] = []
    for num_tokens, start in PREFILLS:
        pairs = num_tokens * start + num_tokens * (num_tokens + 1) / 2
        batch = Batch([chunk(0, num_tokens, start, chance, is_decode=False)])
        kinds.append((f"prefill {num_tokens} behind {start}", batch, (num_tokens, pairs, 0.0)))
    for count, context in DECODES:
        batch = Batch([chunk(n, 1, context - 1, chance, is_decode=True) for n in range(count)])
        kinds.append((f"decode {count} of {context}", batch, (count, 0.0, count * context)))
    return kinds


def fit(features: list[tuple[float, float, float]], times: list[float]) -> tuple[list[float], np.ndarray]:
    """(overhead_s, floor_s, token_s, pair_s, context_s) with the least relative error; and what it says."""
    measured = np.array(times)
    tokens, pairs, contexts = np.array(features).T
    best: tuple[float, list[float], np.ndarray] | None = None
    for knee in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32):  # tokens below which the weights' reading is longer
        columns = np.stack([np.ones_like(tokens), np.maximum(tokens, knee), pairs, contexts], axis=1)
        found = np.linalg.lstsq(columns / measured[:, None], np.ones_like(measured), rcond=None)[0]
        found = np.maximum(found, 0.0)
        said = columns @ found
        error = float(np.mean(np.abs(said / measured - 1)))
        if best is None or error < best[0]:
            overhead, token, pair, context = (float(value) for value in found)
            best = error, [overhead, knee * token, token, pair, context], said
    assert best is not None, "there are knees"
    return best[1], best[2]


def put_rate(layout: KvLayout) -> float:
    """Bytes a second of one put of a prompt's KV, layer by layer, into another heap."""
    with ShmHeap(layout, incarnation=1) as sender, ShmHeap(layout, incarnation=2) as receiver:
        sender.data[:] = 1
        receiver.data[:] = 1
        num_blocks, nbytes, chance, best = (
            PUT_TOKENS // BLOCK_SIZE,
            layout.block_nbytes,
            random.Random(2),
            0.0,
        )
        with sender.attach(receiver.address) as peer:
            for _ in range(NUM_PUTS):
                here, there = (chance.sample(range(layout.num_blocks), num_blocks) for _ in range(2))
                copies = Copies(
                    Copy(a * nbytes, b * nbytes, nbytes) for a, b in zip(here, there, strict=True)
                )
                started = time.perf_counter()
                for layer in range(layout.num_layers):
                    peer.put(copies, layer * layout.layer_nbytes, layer * layout.layer_nbytes)
                best = max(best, layout.num_layers * copies.nbytes / (time.perf_counter() - started))
        return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", help="model directory; default: the demo model")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    directory = Path(arguments.model) if arguments.model else fetch(default_cache(os.environ))
    model = load_model(str(directory), dtype=arguments.dtype)
    spec = model.spec
    layout = KvLayout(
        spec.name, spec.num_layers, NUM_BLOCKS, BLOCK_SIZE, spec.num_kv_heads, spec.head_dim, spec.dtype
    )
    runner = ModelRunner(model, np.zeros(layout.data_nbytes, np.uint8), NUM_BLOCKS, BLOCK_SIZE)
    kinds = steps(random.Random(1))
    times = [float("inf")] * len(kinds)
    for _ in range(arguments.rounds):
        for number, (_, batch, _) in enumerate(kinds):
            started = time.perf_counter()
            runner.execute(batch)
            times[number] = min(times[number], time.perf_counter() - started)
    constants, said = fit([features for _, _, features in kinds], times)
    print(f"{spec.name}, {spec.dtype}, {arguments.threads} threads")
    for (name, _, _), measured, modelled in zip(kinds, times, said, strict=True):
        error = modelled / measured - 1
        print(f"{name:24} {measured * 1e3:9.2f} ms, fit {modelled * 1e3:9.2f} ms ({error:+.0%})")
    print(f"mean error {float(np.mean(np.abs(said / np.array(times) - 1))):.0%}")
    names = ("overhead_s", "floor_s", "token_s", "pair_s", "context_s")
    print("\n".join(f"{name}={value:.4g}" for name, value in zip(names, constants, strict=True)))
    print(f"kv_nbytes_per_token={layout.block_nbytes * layout.num_layers // BLOCK_SIZE}")
    print(f"link_nbytes_per_s={put_rate(layout):.3g}")


if __name__ == "__main__":
    main()
