"""The other process of the heap tests: ``python -m tests.kvcache.heap_process FACTORY INCARNATION BLOCKS``.

Makes a heap, prints its address, then answers each JSON line on stdin with one on stdout.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import msgspec

from microserve.kvcache.heap.heap import Copies, Copy, Heap, PeerHeap
from microserve.kvcache.transfer import LaneWriter
from microserve.protocol.errors import MeshError
from microserve.protocol.grant import Grant, HeapAddress
from tests.kvcache.heap_conformance import FACTORIES
from tests.kvcache.kv_samples import fill, make_layout


class Commands:
    def __init__(self, heap: Heap) -> None:
        self._heap = heap
        self._peer: PeerHeap | None = None

    def attach(self, address: dict[str, Any]) -> str:
        self._peer = self._heap.attach(msgspec.convert(address, HeapAddress))
        return "attached"

    def hold(self, slot: int, lane: int) -> bool:
        return self.peer.hold(slot, lane)

    def let_go(self, slot: int, lane: int) -> str:
        self.peer.let_go(slot, lane)
        return "free"

    def paint_and_signal(self, rounds: int, done: int, seen: int) -> str:
        everything = Copies([Copy(0, 0, self._heap.data.size)])
        for number in range(1, rounds + 1):
            self._heap.data[:] = number % 251
            self.peer.put(everything)
            self.peer.signal(done, number)
            while self.peer.read(seen) < number:
                os.sched_yield()
        return "done"

    def put_for_ever(self, word: int) -> None:
        everything = Copies([Copy(0, 0, self._heap.data.size)])
        number = 0
        while True:
            number += 1
            self.peer.put(everything)
            self.peer.signal(word, number)

    def transfer(self, grant: dict[str, Any], lane: int, begin: int, end: int, seed: int) -> str:
        """Write our part of a grant, each layer in two pieces; the answer is ``ok`` or an error's code."""
        permission = msgspec.convert(grant, Grant)
        layout = self._heap.layout
        blocks = list(range(layout.num_blocks_for(end)))
        fill(self._heap, blocks, end, seed)
        writer = LaneWriter(self._heap, self.peer, permission, lane, begin, end, checksums=True)
        middle = (begin + end) // 2
        try:
            writer.claim()
            for layer in range(layout.num_layers):
                writer.put_layer(layer, blocks, begin, middle)
                writer.put_layer(layer, blocks, middle, end)
        except MeshError as error:
            return error.code
        finally:
            writer.finish()
        return "ok"

    @property
    def peer(self) -> PeerHeap:
        if self._peer is None:
            raise RuntimeError("attach first")
        return self._peer


def main() -> None:
    factory, incarnation, num_blocks = sys.argv[1:]
    with FACTORIES[factory]().create(make_layout(num_blocks=int(num_blocks)), int(incarnation)) as heap:
        _answer(msgspec.to_builtins(heap.address))
        commands = Commands(heap)
        for line in sys.stdin:
            arguments = msgspec.json.decode(line)
            command: Callable[..., Any] = getattr(commands, arguments.pop("do"))
            _answer(command(**arguments))


def _answer(value: Any) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(value) + b"\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
