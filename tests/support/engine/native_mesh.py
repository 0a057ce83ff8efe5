"""Two engine cores on memory heaps that compute with the native CPU step: bits, not only tokens.

The weights are a tiny model's (tiny_model.py), read once for all meshes. ``Mesh.equip`` of ``core_mesh``
otherwise; ``expected`` is a request alone on an engine of its own.
"""

from __future__ import annotations

import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path

import msgspec

from microserve.kvcache.heap.heap import Heap
from microserve.kvcache.heap.local import MemoryHeap
from microserve.kvcache.layout import KvLayout
from microserve.protocol.messages.engine import TokenLogprob
from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.services.engine.core.batch import Runner
from microserve.services.engine.model.model import LoadedModel, load_model
from microserve.services.engine.model.spec import ModelSpec
from microserve.services.engine.native.packing import native_runner
from tests.support.engine.core_mesh import VOCAB, Mesh, generate
from tests.support.engine.model.tiny_model import make_tiny_model


@functools.cache
def tiny(family: str, dtype: str) -> LoadedModel:
    with tempfile.TemporaryDirectory() as directory:
        return load_model(make_tiny_model(Path(directory), family, VOCAB), dtype=dtype)


@dataclass(frozen=True)
class Bits:
    """What was said of a request: tokens, and their log-probabilities with those of the likeliest others."""

    tokens: list[int]
    logprobs: list[TokenLogprob]


def layout_for(layout: KvLayout, spec: ModelSpec) -> KvLayout:
    """One of as many blocks, for the model's KV."""
    return msgspec.structs.replace(
        layout,
        num_layers=spec.num_layers,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        dtype=spec.dtype,
        revision=spec.revision,
    )


class NativeMesh(Mesh):
    checksums = True

    def __init__(
        self, family: str = "llama", dtype: str = "bfloat16", threads: int = 1, **options: int
    ) -> None:
        self.loaded, self.threads = tiny(family, dtype), threads
        super().__init__(**options)

    def equip(self, layout: KvLayout, incarnation: int, num_slots: int) -> tuple[Heap, Runner, int | None]:
        spec = self.loaded.spec
        layout = layout_for(layout, spec)
        heap = MemoryHeap(layout, incarnation=incarnation, registry=self.registry, num_slots=num_slots)
        heap.data[:] = 0xFF  # NaN, in every dtype
        runner = native_runner(
            self.loaded,
            heap.data,
            layout.num_blocks,
            layout.block_size,
            threads=self.threads,
            max_rows=512,
        )
        return heap, runner, None

    def bits(self, name: str, request_id: str) -> Bits:
        engine = getattr(self, name)
        return Bits(engine.tokens[request_id], engine.logprobs[request_id])


def expected(
    prompt: list[int], params: SamplingParams, family: str = "llama", dtype: str = "bfloat16"
) -> Bits:
    """Of a request alone, on an engine that has seen nothing."""
    return _expected(tuple(prompt), msgspec.json.encode(params), family, dtype)


@functools.cache
def _expected(prompt: tuple[int, ...], params: bytes, family: str, dtype: str) -> Bits:
    mesh = NativeMesh(family, dtype, max_num_batched_tokens=512)
    generate(mesh.a, "alone", list(prompt), msgspec.json.decode(params, type=SamplingParams))
    mesh.run()
    bits = mesh.bits("a", "alone")
    mesh.close()
    return bits
