"""SIGKILL of each service with requests in flight: nothing is lost or wrong, nothing hangs, nothing leaks."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from pathlib import Path

import pytest

from microserve.protocol.bus.transport import ZmqBus
from microserve.protocol.messages.request.sampling import SamplingParams
from tests.support.bus.gateway_peer import Answer, BusClient
from tests.support.chaos.judge import next_token_s
from tests.support.engine.engine_client import EngineClient
from tests.support.process.processes import MeshProcesses

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

IN_FLIGHT = 16
TTL_S = 60.0
STRATEGIES = ["data_parallel", "disaggregated", "balanced", "cache_aware", "migrate", "auto"]
WITH_CODEC = ["disaggregated", "cache_aware", "conditional"]


def prompts(seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(20, 250) for _ in range(rng.randrange(50, 400))] for _ in range(IN_FLIGHT)]


async def assert_clean(bus: ZmqBus, mesh: MeshProcesses) -> None:
    """Every living engine gets all of its blocks back."""
    for name, service in mesh.services.items():
        if not name.startswith("engine") or service.process.poll() is not None:
            continue
        async with EngineClient(bus, service.address) as engine, asyncio.timeout(30):
            while True:
                load = (await engine.stats()).load
                assert engine.info is not None
                idle = load.num_running == load.num_waiting == load.num_grants == load.quarantined_blocks == 0
                if idle and load.free_blocks == engine.info.num_blocks:
                    break
                await asyncio.sleep(0.05)


async def serve_all(client: BusClient, seed: int) -> list[str]:
    """Sixteen requests under all strategies; how each ended. None may outlive its deadline."""
    params = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
    answers = [
        client.start(prompt, params, strategy=STRATEGIES[number % len(STRATEGIES)], ttl_s=TTL_S)
        for number, prompt in enumerate(prompts(seed))
    ]
    async with asyncio.timeout(TTL_S + 10.0):
        for answer in answers:
            await answer.done.wait()
    return [answer.reason for answer in answers]


LONG = SamplingParams(max_tokens=200, temperature=1.0, seed=3, ignore_eos=True)


def start_all(client: BusClient, strategy: str | None = None) -> list[Answer]:
    """Sixteen long requests; by default under all strategies in turn."""
    return [
        client.start(prompt, LONG, strategy=strategy or STRATEGIES[number % len(STRATEGIES)], ttl_s=TTL_S)
        for number, prompt in enumerate(prompts(2))
    ]


async def whole_answers(client: BusClient, strategy: str) -> list[list[int]]:
    answers = start_all(client, strategy)
    async with asyncio.timeout(TTL_S + 10.0):
        for answer in answers:
            await answer.done.wait()
    assert {answer.reason for answer in answers} == {"length"}
    return [answer.token_ids for answer in answers]


async def arrivals_of(answer: Answer) -> list[float]:
    """Monotonic times at which tokens came, from now to the end."""
    times = []
    while not answer.done.is_set():
        answer.grown.clear()
        await answer.grown.wait()
        times.append(time.monotonic())
    return times


def in_words(victim: str, killed_at: float, answers: list[Answer], arrivals: list[list[float]]) -> str:
    """How long it took to the next token, of the streams that had a part there (all, for the index)."""
    waits = [
        wait
        for answer, times in zip(answers, arrivals, strict=True)
        if victim == "index" or (answer.ended is not None and victim in answer.ended.engines)
        for wait in next_token_s(times, killed_at)
    ]
    if not waits:
        return f"kill of {victim}: no stream had a part there"
    return (
        f"kill of {victim}: {len(waits)} streams, next token after {statistics.median(waits):.2f} s "
        f"(median), {max(waits):.2f} s (worst)"
    )


@pytest.mark.parametrize("victim", ["engine-0", "engine-1", "index", "router"])
def test_the_rest_serves_on(
    victim: str, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with MeshProcesses(tiny_model, tmp_path) as mesh:
        recovery = asyncio.run(_kill(mesh, victim))
        for name in list(mesh.services):
            mesh.stop(name)
    with capsys.disabled():
        print(f"\n{recovery}")


@pytest.mark.parametrize("victim", ["engine-0", "engine-1"])
def test_so_it_does_where_kv_goes_by_a_codec(victim: str, tiny_model: Path, tmp_path: Path) -> None:
    """What was encoded, on its way, or not decoded when its sender or receiver died."""
    by_codec = ", ".join(f'{name} = {{codec = "lossless-zstd"}}' for name in WITH_CODEC)
    settings = [f"router.strategies={{{by_codec}}}"]
    with MeshProcesses(tiny_model, tmp_path, settings=settings) as mesh:
        asyncio.run(_kill(mesh, victim))
        for name in list(mesh.services):
            mesh.stop(name)
    logs = [service.log.read_text() for service in mesh.history if service.name.startswith("engine")]
    assert any("lossless-zstd" in text for text in logs), "some KV went so"


async def _kill(mesh: MeshProcesses, victim: str) -> str:
    """How quickly the streams went on, in words."""
    bus = ZmqBus(linger_s=0.1)
    try:
        async with BusClient(bus, mesh.router_address) as client:
            await client.wait_engines(2)
            assert await serve_all(client, seed=1) == ["length"] * IN_FLIGHT
            expected = await whole_answers(client, "data_parallel")
            answers = start_all(client)
            async with asyncio.timeout(TTL_S):
                grown = [asyncio.ensure_future(answer.grown.wait()) for answer in answers]
                await asyncio.wait(grown, return_when="FIRST_COMPLETED")
            killed_at = time.monotonic()
            mesh.services[victim].kill()
            for each in grown:
                each.cancel()
            if victim == "router":
                await _other_router(bus, mesh)
                return f"kill of router: a new one had served after {time.monotonic() - killed_at:.2f} s"
            watching = [asyncio.ensure_future(arrivals_of(answer)) for answer in answers]
            async with asyncio.timeout(TTL_S + 10.0):
                for answer in answers:
                    await answer.done.wait()
            for answer, tokens in zip(answers, expected, strict=True):
                assert answer.reason == "length", answer.ended
                assert answer.token_ids == tokens
            recovery = in_words(victim, killed_at, answers, await asyncio.gather(*watching))
            await assert_clean(bus, mesh)
            assert await serve_all(client, seed=3) == ["length"] * IN_FLIGHT
            mesh.services.pop(victim)
            await asyncio.to_thread(mesh.start, victim)
            await client.wait_engines(2)
            assert await serve_all(client, seed=4) == ["length"] * IN_FLIGHT
            await assert_clean(bus, mesh)
            return recovery
    finally:
        bus.close()


async def _other_router(bus: ZmqBus, mesh: MeshProcesses) -> None:
    """The router is gone: its requests end on the engines, and a new router serves."""
    await assert_clean(bus, mesh)
    mesh.services.pop("router")
    await asyncio.to_thread(mesh.start, "router")
    async with BusClient(bus, mesh.router_address) as client:
        await client.wait_engines(2)
        assert await serve_all(client, seed=3) == ["length"] * IN_FLIGHT
    await assert_clean(bus, mesh)
