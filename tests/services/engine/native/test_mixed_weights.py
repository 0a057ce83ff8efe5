"""Engines of one model, one with int8 weights: two models, for KV. Neither takes what the other computed."""

from __future__ import annotations

import pytest

from microserve.kernels.cpu.library import library
from microserve.kvcache.heap.heap import Heap
from microserve.kvcache.heap.local import MemoryHeap
from microserve.kvcache.layout import KvLayout
from microserve.protocol.errors import TransferFailed
from microserve.protocol.messages import engine as wire
from microserve.services.engine.core.batch import Runner
from microserve.services.engine.native.packing import native_runner, pack_model
from tests.support.engine.core_mesh import GREEDY, grant_for, prompt_of, receive, send
from tests.support.engine.native_mesh import NativeMesh, layout_for

pytestmark = pytest.mark.slow
PROMPT = prompt_of(13)


class MixedMesh(NativeMesh):
    def __init__(self, *weights: str) -> None:
        self.weights = iter(weights)
        super().__init__()

    def equip(self, layout: KvLayout, incarnation: int, num_slots: int) -> tuple[Heap, Runner, int | None]:
        weights = next(self.weights)
        spec = pack_model(self.loaded, library(), weights).spec
        layout = layout_for(layout, spec)
        heap = MemoryHeap(layout, incarnation=incarnation, registry=self.registry, num_slots=num_slots)
        runner = native_runner(
            *(self.loaded, heap.data, layout.num_blocks, layout.block_size),
            threads=1,
            max_rows=512,
            weights=weights,
        )
        return heap, runner, None


@pytest.mark.parametrize(
    ("weights", "is_taken"),
    [(("dtype", "int8"), False), (("int8", "dtype"), False), (("int8", "int8"), True)],
)
def test_kv_of_other_weights_is_refused(weights: tuple[str, str], is_taken: bool) -> None:
    mesh = MixedMesh(*weights)
    a, b = mesh.a.core.numerics, mesh.b.core.numerics
    assert (a.name == b.name) is is_taken and a.is_exact and b.is_exact
    assert (mesh.a.core.memory.cache.revision == mesh.b.core.memory.cache.revision) is is_taken
    granted = grant_for(mesh.b, "r", PROMPT, 12)
    receive(mesh.b, "r", granted, 12, GREEDY)
    if is_taken:
        call = send(mesh.a, "r", PROMPT, granted, 0, 12)
        mesh.run()
        assert isinstance(mesh.a.replies[call], wire.Sent)
        assert mesh.b.finished["r"].reason == "length"
    else:
        with pytest.raises(TransferFailed, match=r"layout_hash: \w+ here, \w+ there"):
            send(mesh.a, "r", PROMPT, granted, 0, 12)
        mesh.run()
        assert "r" not in mesh.b.finished
        assert mesh.a.core.progress == 0  # nothing was computed for it
    mesh.close()
