"""A hybrid model of hashes: every token proves that the right KV and the right state were read.

Beside what ``HashRunner`` computes, each layer has a state of fixed size: a chain over all tokens before.
It is read from a request's state blocks and written there before the layer is sent, and each hidden state
is hashed with it. So a state of another length, of another request, half written or of another layer shows
as a wrong token.
"""

from __future__ import annotations

import hashlib
from functools import cache

import msgspec
import numpy as np

from microserve.kvcache.heap.heap import Heap
from microserve.kvcache.heap.local import MemoryHeap
from microserve.kvcache.layout import KvLayout
from microserve.protocol.errors import InternalError
from microserve.services.engine.core.batch import Batch, Chunk, Runner, SampleSpec
from microserve.services.simulation.engine.hash_runner import ROW_NBYTES, HashRunner, hash_layout
from tests.support.engine.core_mesh import GREEDY, VOCAB, Mesh

STATE_NBYTES = 100
"""Of a layer: two blocks of four tokens."""
_START = bytes(STATE_NBYTES)


def _next(state: bytes, token: int, layer: int) -> bytes:
    """The first half of a chain of digests is not enough: all bytes of a state count."""
    key = b"%d %d" % (token, layer)
    first = hashlib.blake2b(state + key, digest_size=50).digest()
    return first + hashlib.blake2b(first + state, digest_size=50).digest()


class HybridHashRunner(HashRunner):
    def _write(self, layer: int, chunk: Chunk, state: list[bytes]) -> None:
        super()._write(layer, chunk, state)
        if bool(chunk.start) is not bool(chunk.state_from):
            raise InternalError(f"a chunk from {chunk.start} on has a state in {chunk.state_from}")
        own, seen = self._read(layer, chunk.state_from) if chunk.state_from else _START, []
        for token in chunk.token_ids:
            own = _next(own, token, layer)
            seen.append(own)
        for number, block in enumerate(chunk.state_to or []):
            start = layer * self._layer_nbytes + block * self._block_nbytes
            piece = own[number * self._block_nbytes : (number + 1) * self._block_nbytes]
            self._kv[start : start + len(piece)] = piece
        self._seen = {**getattr(self, "_seen", {}), id(chunk): seen}

    def _read(self, layer: int, blocks: list[int]) -> bytes:
        starts = [layer * self._layer_nbytes + block * self._block_nbytes for block in blocks]
        return b"".join(bytes(self._kv[at : at + self._block_nbytes]) for at in starts)[:STATE_NBYTES]

    def _attend(self, layer: int, chunk: Chunk, state: list[bytes]) -> list[bytes]:
        each = zip(super()._attend(layer, chunk, state), self._seen.pop(id(chunk)), strict=True)
        return [hashlib.blake2b(hidden + own, digest_size=ROW_NBYTES).digest() for hidden, own in each]


class HybridHashMesh(Mesh):
    def equip(self, layout: KvLayout, incarnation: int, num_slots: int) -> tuple[Heap, Runner, int | None]:
        layout = msgspec.structs.replace(layout, state_nbytes=STATE_NBYTES)
        heap = MemoryHeap(layout, incarnation=incarnation, registry=self.registry, num_slots=num_slots)
        return heap, HybridHashRunner(heap.data, layout, vocab_size=VOCAB), None


@cache
def expect(prompt: tuple[int, ...], num_tokens: int) -> list[int]:
    """Greedy tokens of a request alone, whole prompt at once."""
    num_kv = -(-(len(prompt) + num_tokens) // 4)
    layout = hash_layout(num_blocks=num_kv + 2)
    runner = HybridHashRunner(np.zeros(layout.data_nbytes, np.uint8), layout, vocab_size=VOCAB)
    state, tokens, start = [num_kv, num_kv + 1], list(prompt), 0
    while len(tokens) < len(prompt) + num_tokens:
        spec = SampleSpec(GREEDY, prompt, tokens[len(prompt) :], frozenset())
        table = list(range(num_kv))
        chunk = Chunk(0, tokens[start:], start, table, start, spec, None, state if start else None, state)
        sampled = runner.execute(Batch([chunk])).sampled[0]
        assert sampled is not None
        start = len(tokens)
        tokens.append(sampled.token_id)
    return tokens[len(prompt) :]
