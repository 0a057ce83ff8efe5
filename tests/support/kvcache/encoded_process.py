"""A sender of payloads: ``-m tests.support.kvcache.encoded_process FACTORY INCARNATION BLOCKS``.

As heap_process.py, with KV that a codec makes smaller.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np

from microserve.kvcache.codec.profile import Profile
from microserve.kvcache.grant.writer import LaneWriter
from microserve.kvcache.heap.heap import PeerHeap
from microserve.kvcache.heap.mapped import MappedHeap
from microserve.protocol.messages.kv.grant import Grant, HeapAddress
from tests.support.kvcache.encoded import WIDE, codec_of, rows_of, write_rows
from tests.support.kvcache.heap.heap_factories import FACTORIES
from tests.support.kvcache.heap.heap_process import _answer

CHUNK = 48
"""Tokens of a payload."""


class Commands:
    def __init__(self, heap: MappedHeap) -> None:
        self._heap = heap
        self._peer: PeerHeap | None = None
        self._writer: LaneWriter | None = None

    def attach(self, address: dict[str, Any]) -> str:
        self._peer = self._heap.attach(msgspec.convert(address, HeapAddress))
        return "attached"

    def transfer(
        self, grant: dict[str, Any], seed: int, profile: dict[str, Any] | None, num_puts: int | None = None
    ) -> int:
        """All of it, layer by layer of each chunk; the bytes put. ``profile``: None sends rows; ``num_puts``:
        then it stops, and holds on."""
        assert self._peer is not None
        told, layout = msgspec.convert(grant, Grant), self._heap.layout
        rows = rows_of(layout, told.end, seed)
        blocks = range(layout.num_blocks_for(told.end))
        write_rows(self._heap, blocks, rows)
        codec = codec_of(msgspec.convert(profile, Profile), layout) if profile is not None else None
        bounds = told, 0, told.matched, told.end
        self._writer = writer = LaneWriter(
            *(self._heap, self._peer, *bounds), checksums=True, encoded=codec is not None
        )
        writer.claim()
        nbytes = count = 0
        for lo in range(told.matched, told.end, CHUNK):
            hi = min(lo + CHUNK, told.end)
            for layer in range(layout.num_layers):
                if count == num_puts:
                    self._peer.poll(wait=True)
                    return nbytes
                count += 1
                keys, values = (np.ascontiguousarray(half[lo:hi]) for half in rows[layer])
                out = np.empty(keys.nbytes + values.nbytes - 1, np.uint8)
                size = codec.encode(layer, keys, values, out) if codec is not None else None
                if size is None:
                    nbytes += writer.put_layer(layer, blocks, lo, hi)
                else:
                    nbytes += writer.put_payload(layer, out[:size], lo, hi)
        writer.finish()
        self._peer.poll(wait=True)
        return nbytes


def main() -> None:
    factory, incarnation, num_blocks = sys.argv[1:]
    layout = msgspec.structs.replace(WIDE, num_blocks=int(num_blocks))
    with FACTORIES[factory]().create(layout, int(incarnation)) as heap:
        assert isinstance(heap, MappedHeap)
        _answer(msgspec.to_builtins(heap.address))
        commands = Commands(heap)
        for line in sys.stdin:
            arguments = msgspec.json.decode(line)
            command: Callable[..., Any] = getattr(commands, arguments.pop("do"))
            _answer(command(**arguments))


if __name__ == "__main__":
    main()
