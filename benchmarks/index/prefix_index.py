"""What the prefix index costs: blocks applied per second, lookup time, bytes per block.

    python benchmarks/index/prefix_index.py [--blocks 1000000] [--engines 64]

Prints one line per measurement. Times are CPU time of this thread, so that other work on the machine
disturbs them little. The load: prompts share system prompts of a few lengths, go on alone after them, and
each lives on one to four engines.
"""

from __future__ import annotations

import argparse
import gc
import random
import time
import tracemalloc
from collections.abc import Callable, Iterator

from microserve.kvcache.prefix.hash import block_hashes, root_hash
from microserve.kvcache.prefix.index import PrefixIndex
from microserve.protocol.messages.kv.kv_decoding import decode_batch
from microserve.protocol.messages.kv.kv_events import (
    BlockRemoved,
    BlockStored,
    KVEvent,
    KVEventBatch,
    WireHash,
    encode_batch,
)

BLOCK_SIZE = 16
MODEL = "benchmark"
ROOT = root_hash(MODEL)
UNLIMITED = 1 << 40
RUN_BLOCKS = 64
"""Blocks of one prompt; a prefill stores them as one event."""

Batch = tuple[str, list[KVEvent]]


def random_tokens(rng: random.Random, num_blocks: int) -> list[int]:
    return [rng.randrange(128_000) for _ in range(num_blocks * BLOCK_SIZE)]


def prompts(rng: random.Random, count: int) -> Iterator[list[int]]:
    shared = [random_tokens(rng, num_blocks) for num_blocks in (4, 8, 16, 32) for _ in range(4)]
    for _ in range(count):
        start = rng.choice(shared)
        yield start + random_tokens(rng, RUN_BLOCKS - len(start) // BLOCK_SIZE)


def stored(tokens: list[int], names: list[WireHash] | None = None, *, run: int = RUN_BLOCKS) -> list[KVEvent]:
    """Events of ``run`` blocks each, as they come off the wire: no two share an object."""
    names = names or [*block_hashes(tokens, BLOCK_SIZE, ROOT)]
    events: list[KVEvent] = [
        BlockStored(
            names[i : i + run],
            names[i - 1] if i else None,
            tokens[i * BLOCK_SIZE : (i + run) * BLOCK_SIZE],
            BLOCK_SIZE,
        )
        for i in range(0, len(names), run)
    ]
    return decode_batch(encode_batch(KVEventBatch(0.0, events))).events


def keep_from_collector() -> None:
    """The inputs are ours: what the garbage collector spends on them is not the index's cost."""
    gc.collect()
    gc.freeze()


def report(name: str, value: float, unit: str) -> None:
    print(f"{name:<58}{value:>12,.2f} {unit}", flush=True)


def apply_rate(name: str, batches: list[Batch], num_blocks: int) -> PrefixIndex:
    index = PrefixIndex(BLOCK_SIZE, MODEL, UNLIMITED)
    keep_from_collector()
    begin = time.thread_time()
    for engine_id, events in batches:
        index.apply(engine_id, events)
    report(name, num_blocks / (time.thread_time() - begin) / 1e6, "M blocks/s")
    return index


def lookup_times(name: str, lookups: list[Callable[[], object]]) -> None:
    keep_from_collector()
    for lookup in lookups[:100]:
        lookup()
    times = []
    for lookup in lookups:
        begin = time.thread_time_ns()
        lookup()
        times.append((time.thread_time_ns() - begin) / 1e3)
    times.sort()
    report(f"{name}, p50", times[len(times) // 2], "µs")
    report(f"{name}, p99", times[len(times) * 99 // 100], "µs")


def lookup_of(index: PrefixIndex, tokens: list[int]) -> Callable[[], object]:
    return lambda: index.lookup(tokens)


def lookup_hashes_of(index: PrefixIndex, tokens: list[int]) -> Callable[[], object]:
    hashes = block_hashes(tokens, BLOCK_SIZE, ROOT)
    return lambda: index.lookup_hashes(hashes)


def measure_apply(rng: random.Random, engines: list[str], num_blocks: int) -> None:
    texts = list(prompts(rng, num_blocks // RUN_BLOCKS))
    total = len(texts) * RUN_BLOCKS
    payloads = [encode_batch(KVEventBatch(0.0, stored(tokens))) for tokens in texts]
    keep_from_collector()
    begin = time.thread_time()
    decoded = [decode_batch(payload).events for payload in payloads]
    report("decode, 64-block events", total / (time.thread_time() - begin) / 1e6, "M blocks/s")
    owners = [rng.choice(engines) for _ in texts]
    apply_rate("apply, ours, 64-block events", list(zip(owners, decoded, strict=True)), total)
    del decoded
    batches = [(rng.choice(engines), stored(tokens, run=1)) for tokens in texts]
    apply_rate("apply, ours, batches of 64 one-block events", batches, total)
    batches = [(engine, [event]) for engine, events in batches for event in events]
    index = apply_rate("apply, ours, one block per batch", batches, total)
    removals: list[Batch] = [
        (engine, [BlockRemoved(event.block_hashes)])
        for engine, events in batches
        for event in events
        if isinstance(event, BlockStored)
    ]
    begin = time.thread_time()
    for engine_id, events in removals:
        index.apply(engine_id, events)
    report("apply, ours, one removal per batch", total / (time.thread_time() - begin) / 1e6, "M blocks/s")
    del batches, removals, index
    batches = [
        (rng.choice(engines), stored(tokens, [rng.getrandbits(64) for _ in range(RUN_BLOCKS)]))
        for tokens in texts
    ]
    apply_rate("apply, foreign names, 64-block events", batches, total)


def measure_lookup(rng: random.Random, engines: list[str], num_blocks: int) -> None:
    index = PrefixIndex(BLOCK_SIZE, MODEL, UNLIMITED)
    texts = list(prompts(rng, num_blocks // RUN_BLOCKS))
    for tokens in texts:
        for engine in rng.sample(engines, rng.randint(1, min(4, len(engines)))):
            index.apply(engine, stored(tokens))
    report("distinct blocks in the index", index.num_blocks, "blocks")
    sample = rng.sample(texts, min(5000, len(texts)))
    new = list(prompts(rng, 1000))
    lookup_times("lookup, 64 of 64 blocks known", [lookup_of(index, tokens) for tokens in sample])
    lookup_times(
        "lookup, 16 of 64 blocks known",
        [lookup_of(index, tokens[: 16 * BLOCK_SIZE] + new[0][-48 * BLOCK_SIZE :]) for tokens in sample],
    )
    lookup_times("lookup, no block known", [lookup_of(index, [*tokens[1:], 0]) for tokens in new])
    lookup_times(
        "lookup by hashes, 64 of 64 blocks known", [lookup_hashes_of(index, tokens) for tokens in sample]
    )
    begin = time.thread_time()
    for tokens in sample:
        block_hashes(tokens, BLOCK_SIZE, ROOT)
    report("hashing 64 blocks alone", (time.thread_time() - begin) / len(sample) * 1e6, "µs")
    begin = time.thread_time()
    index.remove_engine(engines[0])
    report("one engine removed", (time.thread_time() - begin) * 1e3, "ms")


def measure_bytes(rng: random.Random, num_blocks: int) -> None:
    for name, foreign in (("ours", False), ("foreign", True)):
        payloads = []
        for tokens in prompts(rng, num_blocks // RUN_BLOCKS):
            names: list[WireHash] | None = (
                [rng.getrandbits(64) for _ in range(RUN_BLOCKS)] if foreign else None
            )
            payloads.append(encode_batch(KVEventBatch(0.0, stored(tokens, names))))
        gc.collect()
        tracemalloc.start()
        index = PrefixIndex(BLOCK_SIZE, MODEL, UNLIMITED)
        for payload in payloads:
            index.apply("engine", decode_batch(payload).events)
        gc.collect()
        allocated, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        report(f"{name}, bytes per block as counted", index.nbytes / index.num_blocks, "B")
        report(f"{name}, bytes per block as allocated", allocated / index.num_blocks, "B")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", type=int, default=500_000, help="blocks applied in each measurement")
    parser.add_argument("--engines", type=int, default=64)
    arguments = parser.parse_args()
    rng = random.Random(0)
    engines = [f"engine-{i:02}" for i in range(arguments.engines)]
    measure_apply(rng, engines, arguments.blocks)
    measure_lookup(rng, engines, arguments.blocks)
    measure_bytes(rng, arguments.blocks // 4)


if __name__ == "__main__":
    main()
