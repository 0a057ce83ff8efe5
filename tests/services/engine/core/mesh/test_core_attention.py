"""The engine core with a real model and the attention of a GPU, on CPU tensors: the same tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from microserve.kvcache.heap.gpu.cuda_ipc import CudaIpcHeap
from microserve.kvcache.heap.heap import Heap
from microserve.kvcache.layout import KvLayout
from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.services.engine.core.batch import Runner
from microserve.services.engine.model.attention.flashinfer import FlashInfer
from microserve.services.engine.model.attention.step import MakeAttention, device_attention
from microserve.services.engine.model.model import LoadedModel, load_model
from microserve.services.engine.model.runner import ModelRunner
from tests.support.engine.core_mesh import ROUTER, generate, grant_for, receive, send
from tests.support.engine.device.device_mesh import DeviceMesh
from tests.support.engine.device.flashinfer_stand_in import StandInWrapper
from tests.support.engine.device.host_driver import HostDriver
from tests.support.engine.model.tiny_model import make_tiny_model

BLOCK = 4
GREEDY = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)
SAMPLED = SamplingParams(max_tokens=5, temperature=0.9, seed=11, ignore_eos=True)


@pytest.fixture(scope="module", params=["llama", "mistral"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoadedModel]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    path: Path = make_tiny_model(tmp_path_factory.mktemp("model") / request.param, request.param)
    yield load_model(path, dtype="float32")
    torch.set_num_threads(before)


class ModelMesh(DeviceMesh):
    """Engines with a model. It computes at once, so nothing has to be followed."""

    def __init__(self, model: LoadedModel, make_attention: MakeAttention | None) -> None:
        self.model, self.make_attention = model, make_attention
        super().__init__(block_size=BLOCK, num_blocks=64)

    def equip(self, layout: KvLayout, incarnation: int, num_slots: int) -> tuple[Heap, Runner, int | None]:
        spec, driver = self.model.spec, HostDriver()
        self.drivers.append(driver)
        layout = KvLayout(
            model=spec.name,
            num_layers=spec.num_layers,
            num_blocks=layout.num_blocks,
            block_size=layout.block_size,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            dtype=spec.dtype,
        )
        heap = CudaIpcHeap(layout, incarnation=incarnation, driver=driver, num_slots=num_slots)
        data = torch.from_numpy(driver.host_view(heap.data.address, heap.data.nbytes))
        runner = ModelRunner(
            self.model, data, layout.num_blocks, layout.block_size, make_attention=self.make_attention
        )
        return heap, runner, None


def serve(model: LoadedModel, make_attention: MakeAttention | None) -> dict[str, list[int]]:
    """Decodes beside chunked prefills; splits with and without prefix hits; a send that is aborted."""
    mesh = ModelMesh(model, make_attention)
    stem = [7 * i % 311 + 3 for i in range(40)]
    generate(mesh.a, "long", stem, SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True))
    for number, (length, border, params) in enumerate(
        [(9, 4, GREEDY), (33, 21, SAMPLED), (40, 40, GREEDY), (17, 16, SAMPLED), (35, 33, GREEDY)]
    ):
        request_id, prompt = f"r{number}", [*stem[: length - 2], number, 5]
        generate(mesh.a, f"beside{number}", prompt[::-1], params)
        granted = grant_for(mesh.b, request_id, prompt, border)
        receive(mesh.b, request_id, granted, border, params)
        if granted.grant.matched < border:
            send(mesh.a, request_id, prompt, granted, 0, border)
        if number == 3:
            granted = grant_for(mesh.b, "gone", stem[::-1], 30)
            send(mesh.a, "gone", stem[::-1], granted, 0, 30)
            mesh.a.step()
            for engine in (mesh.a, mesh.b):
                engine.core.actions.abort(ROUTER, wire.Abort(mesh.call(), "gone"), mesh.now)
        if number != 1:
            mesh.run()
    tokens = mesh.a.tokens | mesh.b.tokens
    mesh.close()
    return tokens


def test_the_attention_of_a_gpu_gives_the_engine_the_same_tokens(model: LoadedModel) -> None:
    normal = serve(model, None)
    assert sorted(normal) == [*(f"beside{n}" for n in range(5)), "long", *(f"r{n}" for n in range(5))]
    assert {len(tokens) for tokens in normal.values()} == {5, 30}

    assert serve(model, device_attention) == normal
    assert serve(model, FlashInfer(StandInWrapper)) == normal
