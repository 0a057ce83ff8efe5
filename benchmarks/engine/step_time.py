"""What a step of this project's own engine takes, and the constants of a simulation profile fitted to it.

    python benchmarks/engine/step_time.py [--write] [--model DIR] [--dtype bfloat16] [--rounds 5] [--json]

Runs steps of several kinds by the native step on one thread (prefills of many lengths behind many tokens,
decodes of several sequences and contexts, both in one step; on random blocks of a pool) and prints the least
CPU time of each, what the fit says, and the fit: ``services/simulation/load/timing.py`` says what the
constants mean. CPU time is what one thread takes on a machine of its own, nearly: other work leaves caches
cold, so the kinds take turns within a round, and the least of a kind's rounds counts. The link is the best of
some puts of a whole prompt's KV into another engine's shared memory, by the wall clock. What an engine does
around a step (Python, sockets) is not in it. ``--write`` puts the constants into timing.py.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch
from engine_parts.steps import BLOCK_SIZE, NUM_BLOCKS, Engine

from microserve.kvcache.heap.heap import Copies, Copy
from microserve.kvcache.heap.shm import ShmHeap
from microserve.kvcache.layout import KvLayout
from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.services.engine.core.batch import Batch, Chunk, SampleSpec

PREFILLS = [(n, start) for n in (2, 8, 32, 128, 512) for start in (0, 1024, 4096)]
DECODES = [(count, context) for count in (1, 4, 16, 32) for context in (64, 768)]
MIXED = [(504, 0, 8, 768), (496, 1024, 16, 256)]
"""A prefill's tokens, those before them, sequences that decode, their contexts."""
TIMING = Path(__file__).parents[2] / "services" / "simulation" / "load" / "timing.py"
BEGIN, END = "# <fitted by benchmarks/engine/step_time.py>\n", "# </fitted>\n"
PUT_TOKENS = 1024
NUM_PUTS = 15


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
    for num_tokens, start, count, context in MIXED:
        pairs = num_tokens * start + num_tokens * (num_tokens + 1) / 2
        prefill = chunk(count, num_tokens, start, chance, is_decode=False)
        decodes = [chunk(n, 1, context - 1, chance, is_decode=True) for n in range(count)]
        features = (count + num_tokens, pairs, count * context)
        name = f"prefill {num_tokens} behind {start} + decode {count} of {context}"
        kinds.append((name, Batch([*decodes, prefill]), features))
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


def processor() -> str:
    """Its model, as Linux names it."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "unknown one")


def written(source: str, constants: dict[str, float], told: str) -> str:
    """timing.py with other constants between its marks. Raises :class:`ValueError` where it has none."""
    before, begin, rest = source.partition(BEGIN)
    inside, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{TIMING} has no {BEGIN.strip()} ... {END.strip()}")
    for name, value in constants.items():
        inside = re.sub(rf"    {name}=[^,]*,", f"    {name}={value!r},", inside)
    inside = re.sub(r'""".*?"""', f'"""{told}"""', inside, flags=re.DOTALL)
    return before + BEGIN + inside + END + after


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else "")
    parser.add_argument("--model", default="", help="Its directory; default: the demo model.")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--variant", default="auto", help="Of the native step.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="Put the constants into timing.py.")
    parser.add_argument("--json", action="store_true", help="Print one line of JSON.")
    options = parser.parse_args()
    torch.set_num_threads(1)
    engine = Engine(options.model, options.dtype)
    runner, layout = engine.native(1, options.variant), engine.layout
    kinds = steps(random.Random(1))
    times = [float("inf")] * len(kinds)
    for _ in range(options.rounds):
        for number, (_, batch, _) in enumerate(kinds):
            started = time.process_time()
            runner.execute(batch)
            times[number] = min(times[number], time.process_time() - started)
    found, said = fit([features for _, _, features in kinds], times)
    errors = said / np.array(times) - 1
    names = ("overhead_s", "floor_s", "token_s", "pair_s", "context_s")
    constants = {name: float(f"{value:.3g}") for name, value in zip(names, found, strict=True)}
    constants["kv_nbytes_per_token"] = layout.block_nbytes * layout.num_layers // BLOCK_SIZE
    constants["link_nbytes_per_s"] = float(f"{put_rate(layout):.3g}")
    worst = int(np.argmax(np.abs(errors)))
    told = (
        f"{layout.model}, {options.dtype}, the native step ({runner.kernels}), one thread of {processor()},\n"
        f"{datetime.date.today().isoformat()}, in CPU time. The fit misses a kind of step by "
        f"{float(np.mean(np.abs(errors))):.0%} on the average, and by {abs(errors[worst]):.0%} at\n"
        f"most ({kinds[worst][0]})."
    )
    if options.write:
        TIMING.write_text(written(TIMING.read_text(encoding="utf-8"), constants, told), encoding="utf-8")
    if options.json:
        points = {name: float(f"{ms * 1e3:.4g}") for (name, _, _), ms in zip(kinds, times, strict=True)}
        print(json.dumps({"rounds": options.rounds, "points_cpu_ms": points, "fit": constants}))
        return
    print(told.replace("\n", " "), file=sys.stderr)
    for (name, _, _), measured, modelled, error in zip(kinds, times, said, errors, strict=True):
        print(f"{name:44} {measured * 1e3:9.2f} ms, fit {modelled * 1e3:9.2f} ms ({error:+.0%})")
    print("\n".join(f"{name}={value!r}" for name, value in constants.items()))


if __name__ == "__main__":
    main()
