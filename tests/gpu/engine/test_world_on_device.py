"""A mesh whose two engines are one NVSHMEM world on one GPU, without MPS: services, bus, library are real."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

from microserve.protocol import log
from microserve.protocol.bus.curve import CurveKeys, create_keys
from microserve.protocol.bus.transport import ZmqBus
from microserve.protocol.messages.request.sampling import SamplingParams
from tests.gpu.heap.test_nvshmem_on_device import ENVIRONMENT
from tests.support.bus.gateway_peer import BusClient
from tests.support.engine.model.tiny_model import make_tiny_model
from tests.support.process.processes import MeshProcesses

GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
STRATEGIES = ["data_parallel", "disaggregated", "balanced", "migrate"]
DEATH_S = 30.0


async def serve(mesh: MeshProcesses, keys: Path) -> None:
    bus = ZmqBus(linger_s=0.1, keys=CurveKeys.load(keys))
    try:
        async with BusClient(bus, mesh.router_address) as client:
            await client.wait_engines(2)
            for length in (5, 33, 200):
                prompt = [(7 * at) % 300 for at in range(length)]
                # A salt of its own: no strategy finds what another has left in the caches.
                answers = [
                    await client.generate(prompt, GREEDY, strategy=name, salt=f"{name}{length}")
                    for name in STRATEGIES
                ]
                assert [answer.reason for answer in answers] == ["length"] * len(STRATEGIES)
                assert [answer.token_ids for answer in answers[1:]] == [answers[0].token_ids] * 3
            assert [
                e for name in ("engine-0", "engine-1") for e in mesh.events(name) if e["event"] == log.KV_SENT
            ]

            mesh.services["engine-1"].kill()
            async with asyncio.timeout(DEATH_S):
                while not [e for e in mesh.events("engine-0") if e["event"] == log.RANK_LOST]:
                    await asyncio.sleep(0.1)
            assert (await client.generate(prompt, GREEDY, salt="alone")).token_ids == answers[0].token_ids
    finally:
        bus.close()


@pytest.mark.slow
@pytest.mark.system
def test_a_world_of_two_engines_serves_and_outlives_one_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: torch.cuda.is_available() is False")
    pytest.importorskip("nvshmem", reason="needs nvshmem4py")
    for name, value in ENVIRONMENT.items():
        if (
            name.startswith("NVSHMEM_") and name != "NVSHMEM_SYMMETRIC_SIZE"
        ):  # that one the engine says itself
            monkeypatch.setenv(name, value)
    model = make_tiny_model(tmp_path / "model", "llama", head_dim=64)
    create_keys(tmp_path / "keys")
    settings = [
        f"bus.curve_dir={tmp_path / 'keys'}",
        "engine.device=cuda:0",
        "kvcache.heap=nvshmem",
        "kvcache.checksums=false",
        "kvcache.num_blocks=256",
        "kvcache.grant_slots=16",
        "nvshmem.world=w",
        "nvshmem.num_ranks=2",
        "nvshmem.memory_mb=64",
        "nvshmem.join_timeout_s=100",
    ]
    ranks = {number: [f"nvshmem.rank={number}"] for number in range(2)}
    with MeshProcesses(model, tmp_path, settings=settings, engine_settings=ranks) as mesh:
        asyncio.run(serve(mesh, tmp_path / "keys"))
        engine = mesh.services["engine-0"].process
        mesh.stop("engine-0")  # within 20 s, though the other rank is dead
        assert engine.returncode == 0
