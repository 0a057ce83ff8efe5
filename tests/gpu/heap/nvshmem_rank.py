"""One of two ranks on one GPU: ``python -m tests.gpu.heap.nvshmem_rank RANK FOLDER``.

The ranks find each other through files in the folder, which nobody else may read: one is the unique id.
"""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

from microserve.kvcache.heap.gpu.cuda_driver import LibCuda
from microserve.kvcache.heap.gpu.nvshmem import NvshmemHeap
from microserve.kvcache.heap.gpu.nvshmem_world import NvshmemWorld, new_unique_id
from microserve.protocol.messages.kv.grant import HeapAddress
from tests.support.kvcache.heap.heap_child import wait_until
from tests.support.kvcache.heap.heap_stress import receive_random, send_random
from tests.support.kvcache.kv_samples import make_layout

NUM_RANKS = 2
NUM_ROUNDS = 10_000
CAPACITY_NBYTES = 1 << 20


def main() -> int:
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    if rank == 0:
        _publish(folder / "unique_id", new_unique_id())
    world = NvshmemWorld(_fetch(folder / "unique_id"), rank=rank, num_ranks=NUM_RANKS)
    heap = NvshmemHeap(
        make_layout(), incarnation=rank + 1, world=world, driver=LibCuda(), capacity_nbytes=CAPACITY_NBYTES
    )
    _publish(folder / f"address{rank}", msgspec.json.encode(heap.address))
    other = msgspec.json.decode(_fetch(folder / f"address{1 - rank}"), type=HeapAddress)
    num_wrong = 0
    if rank == 1:
        with heap.attach(other) as peer:
            send_random(heap, peer, NUM_ROUNDS)
    else:
        num_wrong = receive_random(heap, make_layout(), NUM_ROUNDS)
        wait_until(lambda: _is_free(heap), "the lane")
    world.barrier()
    heap.close()
    world.leave()
    print(f"rank {rank}: {NUM_ROUNDS} rounds, {num_wrong} wrong bytes")
    return 1 if num_wrong else 0


def _is_free(heap: NvshmemHeap) -> bool:
    heap.poll(wait=True)
    return not heap.is_held(0, 0)


def _publish(path: Path, content: bytes) -> None:
    part = path.with_suffix(".part")
    part.write_bytes(content)
    part.rename(path)


def _fetch(path: Path) -> bytes:
    wait_until(path.exists, str(path))
    return path.read_bytes()


if __name__ == "__main__":
    sys.exit(main())
