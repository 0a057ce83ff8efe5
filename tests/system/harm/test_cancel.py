"""A client that leaves, in each phase: every engine involved drops the request and serves on."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from microserve.protocol.bus.transport import ZmqBus
from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.request.sampling import SamplingParams
from tests.support.bus.gateway_peer import BusClient
from tests.support.engine.engine_client import EngineClient
from tests.support.process.processes import MeshProcesses

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

STRATEGIES = ["data_parallel", "disaggregated", "balanced", "cache_aware", "migrate", "auto"]
LONG = SamplingParams(max_tokens=400, temperature=0.0, ignore_eos=True)


def prompt_of(length: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(20, 250) for _ in range(length)]


async def until_idle(engines: list[EngineClient]) -> list[wire.EngineStats]:
    """Wait for engines that hold no request; their stats then."""
    async with asyncio.timeout(20):
        while True:
            stats = [await engine.stats() for engine in engines]
            loads = [s.load for s in stats]
            if all(
                x.num_running == x.num_waiting == x.num_grants == x.quarantined_blocks == 0 for x in loads
            ):
                return stats
            await asyncio.sleep(0.02)


def test_every_phase(tiny_model: Path, tmp_path: Path) -> None:
    # One sequence a step and small chunks, so that there is a queue and prefill takes many steps.
    settings = ["engine.max_num_seqs=1", "engine.max_num_batched_tokens=16", "kvcache.num_blocks=512"]
    with MeshProcesses(tiny_model, tmp_path, settings=settings) as mesh:
        asyncio.run(_cancel(mesh))


async def _cancel(mesh: MeshProcesses) -> None:
    bus = ZmqBus(linger_s=0.1)
    seed = 0
    try:
        async with (
            BusClient(bus, mesh.router_address) as client,
            EngineClient(bus, mesh.services["engine-0"].address) as first,
            EngineClient(bus, mesh.services["engine-1"].address) as second,
        ):
            await client.wait_engines(2)
            engines = [first, second]
            for strategy in STRATEGIES:
                for phase in ("queued", "prefill", "decode"):
                    seed += 1
                    length = 1200 if phase == "prefill" else 40
                    blockers = []
                    if phase == "queued":
                        blockers = [
                            client.start(prompt_of(40, 1000 + seed + n), LONG, strategy="data_parallel")
                            for n in range(2)
                        ]
                        for blocker in blockers:
                            await _grown(blocker)
                    answer = client.start(prompt_of(length, seed), LONG, strategy=strategy)
                    await _reach(phase, answer, engines)
                    for each in (answer, *blockers):
                        client.cancel(each)
                    async with asyncio.timeout(20):
                        await answer.done.wait()
                    assert answer.reason == "abort", (strategy, phase, answer.ended)
                    for stats in await until_idle(engines):
                        assert stats.load.free_blocks == 512, (strategy, phase)
            check = await client.generate(prompt_of(30, 1), SamplingParams(max_tokens=5, ignore_eos=True))
            assert check.reason == "length"
    finally:
        bus.close()


async def _grown(answer: object) -> None:
    async with asyncio.timeout(20):
        await answer.grown.wait()  # type: ignore[attr-defined]


async def _reach(phase: str, answer: object, engines: list[EngineClient]) -> None:
    """Until the request is in the phase, or past it: the outcome is the same."""
    async with asyncio.timeout(20):
        if phase == "decode":
            await _grown(answer)
            return
        while True:
            loads = [(await engine.stats()).load for engine in engines]
            if any(load.num_waiting or load.num_running or load.num_grants for load in loads):
                return
            await asyncio.sleep(0.001)
