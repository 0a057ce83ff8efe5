"""What a put into shared memory costs: against memcpy, and scattered blocks against contiguous ones.

    python benchmarks/heap_put.py [--tokens 512] [--rounds 41]

Prints one line per KV geometry. Every variant moves the same bytes: the KV of one prefill chunk, one layer
after the other, between pools far larger than the caches, at another place each round. The variants take
turns within a round and the median of their per-round ratios is printed, so that other work on the machine
disturbs them little.

    memcpy      one memmove per layer between two ordinary buffers
    contiguous  put, blocks in a row on both sides: merged into one copy per layer
    scattered   put, blocks anywhere on both sides: one copy per block and layer
    reversed    put, blocks in a row whose tables both run backwards: merged again
    lane        scattered, with all that LaneWriter does beside the copies
"""

from __future__ import annotations

import argparse
import ctypes
import random
import statistics
import time
from collections.abc import Callable

import numpy as np

from microserve.kvcache.block_pool import BlockPool
from microserve.kvcache.grant.table import GrantTable
from microserve.kvcache.grant.writer import LaneWriter, TransferPlan
from microserve.kvcache.heap.heap import Copies, Copy
from microserve.kvcache.heap.shm import ShmHeap
from microserve.kvcache.layout import KvLayout
from microserve.protocol.messages.kv.grant import Grant

POOL_NBYTES = 1 << 29
NUM_LAYERS = 16
GEOMETRIES = {
    "2 heads x 64 bf16": (2, 64, "bfloat16"),
    "3 heads x 64 bf16": (3, 64, "bfloat16"),
    "3 heads x 64 fp32": (3, 64, "float32"),
    "8 heads x 128 bf16": (8, 128, "bfloat16"),
}


class Bench:
    def __init__(self, layout: KvLayout, num_tokens: int) -> None:
        self.layout = layout
        self.num_tokens = num_tokens
        self.num_blocks = layout.num_blocks_for(num_tokens)
        self.nbytes = self.num_blocks * layout.block_nbytes
        self.sender = ShmHeap(layout, incarnation=1)
        self.receiver = ShmHeap(layout, incarnation=2)
        self.peer = self.sender.attach(self.receiver.address)
        self.pool = BlockPool(layout.num_blocks)
        self.table = GrantTable(
            self.receiver, self.pool, engine_id="e", incarnation=2, lease_s=60.0, verify_checksums=False
        )
        self.plain = [np.ones(layout.data_nbytes, np.uint8) for _ in range(2)]
        self.sender.data[:] = 1
        # Each page is there, on both sides, and in the peer's mapping: later puts find it so.
        self.peer.put(Copies([Copy(0, 0, layout.data_nbytes)]))

    def close(self) -> None:
        self.peer.close()
        self.sender.close()
        self.receiver.close()

    def memcpy(self, chance: random.Random) -> float:
        source, target = (buffer.ctypes.data for buffer in self.plain)
        start = chance.randrange(self.layout.num_blocks - self.num_blocks) * self.layout.block_nbytes
        other = chance.randrange(self.layout.num_blocks - self.num_blocks) * self.layout.block_nbytes

        def run() -> None:
            for layer in range(NUM_LAYERS):
                shift = layer * self.layout.layer_nbytes
                ctypes.memmove(target + other + shift, source + start + shift, self.nbytes)

        return timed(run)

    def contiguous(self, chance: random.Random) -> float:
        return self._put(self._run(chance), self._run(chance))

    def scattered(self, chance: random.Random) -> float:
        return self._put(self._any(chance), self._any(chance))

    def reversed(self, chance: random.Random) -> float:
        return self._put(self._run(chance)[::-1], self._run(chance)[::-1])

    def lane(self, chance: random.Random) -> float:
        source, blocks = self._any(chance), self._any(chance)
        grant = self.table.open(
            "r", "o", [], 0, self.pool.allocate(self.num_blocks), self.num_tokens, time.monotonic()
        )
        writer = LaneWriter(
            *(self.sender, self.peer, self._with_blocks(grant, blocks), 0, 0, self.num_tokens)
        )

        def run() -> None:
            writer.claim()
            for layer in range(NUM_LAYERS):
                writer.put_layer(layer, source, 0, self.num_tokens)
            writer.finish()

        elapsed = timed(run)
        self.table.close(grant.grant_id, time.monotonic())
        return elapsed

    def _put(self, source: list[int], target: list[int]) -> float:
        copies = self._plan(source, target)

        def run() -> None:
            for layer in range(NUM_LAYERS):
                self.peer.put(copies, layer * self.layout.layer_nbytes, layer * self.layout.layer_nbytes)

        return timed(run)

    def _plan(self, source: list[int], target: list[int]) -> Copies:
        grant = Grant(
            *("g", "e", 2, 0, 1, 0, self.num_tokens, target, self.layout.block_size, self.layout.layout_hash),
            heap=self.receiver.address,
            lease_s=60.0,
        )
        plan = TransferPlan(self.layout, self.layout, grant, 0, self.num_tokens)
        return plan.copies(source, 0, self.num_tokens)

    def _with_blocks(self, grant: Grant, blocks: list[int]) -> Grant:
        values = [getattr(grant, field) for field in grant.__struct_fields__]
        values[grant.__struct_fields__.index("blocks")] = blocks
        return Grant(*values)

    def _run(self, chance: random.Random) -> list[int]:
        start = chance.randrange(self.layout.num_blocks - self.num_blocks)
        return list(range(start, start + self.num_blocks))

    def _any(self, chance: random.Random) -> list[int]:
        return chance.sample(range(self.layout.num_blocks), self.num_blocks)


def timed(run: Callable[[], None]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512, help="tokens of one chunk")
    parser.add_argument("--rounds", type=int, default=41)
    arguments = parser.parse_args()
    chance = random.Random(1)
    for name, (num_kv_heads, head_dim, dtype) in GEOMETRIES.items():
        small = KvLayout("benchmark", NUM_LAYERS, 1, 16, num_kv_heads, head_dim, dtype)
        num_blocks = POOL_NBYTES // small.data_nbytes
        bench = Bench(
            KvLayout("benchmark", NUM_LAYERS, num_blocks, 16, num_kv_heads, head_dim, dtype), arguments.tokens
        )
        variants = (bench.memcpy, bench.contiguous, bench.scattered, bench.reversed, bench.lane)
        rounds = [[variant(chance) for variant in variants] for _ in range(arguments.rounds)]
        memcpy, contiguous, scattered, backwards, lane = zip(*rounds, strict=True)
        bench.close()

        def rate(times: tuple[float, ...], nbytes: int = NUM_LAYERS * bench.nbytes) -> str:
            return f"{nbytes / statistics.median(times) / 2**30:5.1f}"

        def ratio(base: tuple[float, ...], times: tuple[float, ...]) -> str:
            return f"{statistics.median(b / t for b, t in zip(base, times, strict=True)):.2f}"

        print(
            f"{name:20} block {small.block_nbytes >> 10:3} KiB  GiB/s: memcpy {rate(memcpy)}"
            f"  contiguous {rate(contiguous)}  scattered {rate(scattered)}  reversed {rate(backwards)}"
            f"  lane {rate(lane)}  | contiguous/memcpy {ratio(memcpy, contiguous)}"
            f"  scattered/contiguous {ratio(contiguous, scattered)}  lane/scattered {ratio(scattered, lane)}"
        )


if __name__ == "__main__":
    main()
