"""The other process of heap tests: ``-m tests.support.kvcache.heap.heap_process FACTORY INCARNATION BLOCKS``.

Makes a heap, prints its address, then answers each JSON line on stdin with one on stdout.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import msgspec

from microserve.kvcache.grant.writer import LaneWriter
from microserve.kvcache.heap.gpu.cuda_ipc import CudaIpcPeerHeap
from microserve.kvcache.heap.gpu.device import MIN_RUNS_OF_A_LAUNCH
from microserve.kvcache.heap.heap import Copies, Copy, Heap, PeerHeap
from microserve.protocol.errors import MeshError
from microserve.protocol.messages.kv.grant import Grant, HeapAddress
from tests.support.kvcache.heap.heap_factories import FACTORIES
from tests.support.kvcache.heap.heap_stress import cut, send_random
from tests.support.kvcache.kv_samples import fill, make_layout, set_data


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
        self.peer.poll(wait=True)
        return "free"

    def lose_file(self) -> str:
        """Of a heap whose words are a file: what the kernel takes first from a process that dies."""
        assert isinstance(self.peer, CudaIpcPeerHeap)
        self.peer._shared.close()
        return "lost"

    def paint_and_signal(self, rounds: int, done: int, seen: int) -> str:
        everything = self._everything()
        for number in range(1, rounds + 1):
            set_data(self._heap, number % 251)
            self.peer.put(everything)
            self.peer.signal(done, number)
            while self.peer.read(seen) < number:
                os.sched_yield()
        return "done"

    def claim_against_close(self, rounds: int, state: int, go: int, result: int) -> str:
        """Each round: take lane 0 of slot 0, look at ``state``, and say 1 if it is still open. Keep the lane
        until the next round."""
        for number in range(1, rounds + 1):
            while self.peer.read(go) < number:
                pass
            self.peer.let_go(0, 0)
            self.peer.poll(wait=True)
            is_open = self.peer.hold(0, 0) and self.peer.read(state) < number
            if not is_open:
                self.peer.let_go(0, 0)
            self.peer.signal(result, 2 * number + is_open)
        return "done"

    def send_random(self, rounds: int) -> str:
        send_random(self._heap, self.peer, rounds)
        return "done"

    def put_for_ever(self, word: int) -> None:
        everything = self._everything()
        number = 0
        while True:
            number += 1
            self.peer.put(everything)
            self.peer.signal(word, number)

    def paint_for_ever(self, word: int) -> None:
        """Each round another value everywhere, once the one before is there."""
        everything = self._everything()
        number = 0
        while True:
            number += 1
            set_data(self._heap, number % 251)
            self.peer.put(everything)
            self.peer.signal(word, number)
            self.peer.poll(wait=True)

    def fill(self, num_tokens: int, seed: int) -> str:
        """The KV that the following transfers send."""
        fill(self._heap, self._blocks(num_tokens), num_tokens, seed)
        return "filled"

    def claim(self, grant: dict[str, Any], lane: int, begin: int, end: int) -> str:
        self._writer = LaneWriter(
            self._heap, self.peer, msgspec.convert(grant, Grant), lane, begin, end, checksums=True
        )
        self._writer.claim()
        return "claimed"

    def put(self, lo: int, hi: int) -> str:
        """Tokens ``[lo, hi)`` in every layer."""
        for layer in range(self._heap.layout.num_layers):
            self._writer.put_layer(layer, self._blocks(hi), lo, hi)
        self.peer.poll(wait=True)
        return "put"

    def finish(self) -> str:
        self._writer.finish()
        self.peer.poll(wait=True)
        return "finished"

    def transfer(self, grant: dict[str, Any], lane: int, begin: int, end: int) -> str:
        """All of it, token by token; the answer is ``finished`` or an error's code."""
        try:
            self.claim(grant, lane, begin, end)
            for token in range(begin, end):
                for layer in range(self._heap.layout.num_layers):
                    self._writer.put_layer(layer, self._blocks(token + 1), token, token + 1)
                self.peer.poll()
                # Lets the receiver in between on a machine with few cores.
                os.sched_yield()
        except MeshError as error:
            return error.code
        finally:
            self.finish()
        return "finished"

    def _blocks(self, num_tokens: int) -> list[int]:
        return list(range(self._heap.layout.num_blocks_for(num_tokens)))

    def _everything(self) -> Copies:
        """All bytes: in one run, or in as many as a heap that puts by launch leaves to one, back to front."""
        nbytes, is_launched = (
            self._heap.layout.data_nbytes,
            getattr(self.peer, "_block_put", None) is not None,
        )
        runs = cut(nbytes, MIN_RUNS_OF_A_LAUNCH if is_launched else 1)
        return Copies(Copy(nbytes - end, begin, end - begin) for begin, end in runs)

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
