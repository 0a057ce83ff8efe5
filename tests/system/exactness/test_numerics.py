"""Engines of two numerics classes in one mesh of real processes, and two kinds of processors in a class."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from microserve.kernels.cpu.library import library
from microserve.protocol import log
from microserve.protocol.bus.transport import ZmqBus
from microserve.protocol.messages.numerics import MIXED, Numerics
from microserve.protocol.messages.request.sampling import SamplingParams
from tests.support.bus.gateway_peer import Answer, BusClient
from tests.support.engine.model.tiny_model import make_tiny_model
from tests.support.process.processes import MeshProcesses

pytestmark = [pytest.mark.system, pytest.mark.timeout(400), pytest.mark.slow]

NUM_TOKENS = 60
LONG = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True, logprobs=2)
PROMPTS = [list(range(first, first + 40)) for first in range(20, 24)]
PLAIN, BEST, OTHER = "engine-0", "engine-1", "engine-2"
KERNELS = {
    0: ["engine.cpu_kernels=portable"],
    1: [f"engine.cpu_kernels={'avx512' if library().supports('avx512') else 'auto'}"],
    2: ["engine.cpu_kernels=transformers"],
}


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[MeshProcesses]:
    """One engine, without vector instructions; the others are started by the test."""
    model = make_tiny_model(tmp_path / "tiny")
    # An engine that is stopped must not be missed before it is killed.
    settings = ["model.name=tiny", "bus.liveness=400"]
    with MeshProcesses(
        model, tmp_path, num_engines=1, gateway=True, settings=settings, engine_settings=KERNELS
    ) as mesh:
        yield mesh


@asynccontextmanager
async def client_of(mesh: MeshProcesses) -> AsyncIterator[BusClient]:
    bus = ZmqBus(linger_s=0.1)
    try:
        async with BusClient(bus, mesh.router_address) as client:
            await client.wait_engines(1)
            yield client
    finally:
        bus.close()


async def all_of(client: BusClient, strategy: str) -> list[Answer]:
    return await asyncio.gather(*(client.generate(prompt, LONG, strategy=strategy) for prompt in PROMPTS))


def bits(answers: list[Answer]) -> list[tuple[list[int], list[float]]]:
    return [(each.token_ids, [logprob.logprob for logprob in each.logprobs]) for each in answers]


def class_of(mesh: MeshProcesses, engine: str) -> str:
    """As its router was told, and as it says of itself."""
    events = [e for e in mesh.events("router") if e["event"] == log.ENGINE_JOINED]
    joined = [e for e in events if e["engine_id"] == engine]
    [ready] = [e for e in mesh.events(engine) if e["event"] == log.SERVICE_READY]
    name = str(joined[-1]["numerics"])
    assert name and str(ready["about"]).endswith(f" in {name}")
    return name


async def begin(client: BusClient, mesh: MeshProcesses, engine: str) -> list[Answer]:
    """Streams on the only engine, which stands still in the middle of them."""
    answers = [client.start(prompt, LONG, strategy="data_parallel") for prompt in PROMPTS]
    await asyncio.gather(*(answer.tokens(5) for answer in answers))
    os.kill(mesh.services[engine].process.pid, signal.SIGSTOP)
    assert not any(answer.done.is_set() for answer in answers), "they were too short"
    return answers


def test_two_kinds_of_processors_are_one_class_and_transformers_is_another(mesh: MeshProcesses) -> None:
    async def main() -> None:
        async with client_of(mesh) as client:
            expected = [await client.generate(prompt, LONG, strategy="data_parallel") for prompt in PROMPTS]
            ours = Numerics(class_of(mesh, PLAIN), is_exact=True)
            assert {each.result.numerics for each in expected} == {ours}
            alone = bits(expected)

            # Streams outlive their engine on one of the same class, though another one is as free.
            answers = await begin(client, mesh, PLAIN)
            for name in (BEST, OTHER):
                mesh.start(name)
            await client.wait_engines(3)
            assert class_of(mesh, BEST) == ours.name != class_of(mesh, OTHER)
            mesh.services[PLAIN].kill()
            for answer in answers:
                await answer.wait(60)
            assert bits(answers) == alone
            for answer in answers:
                assert answer.numerics == [ours] and answer.result.numerics == ours
                assert answer.result.engines == [PLAIN, BEST]

            # Any strategy between two kinds of processors.
            mesh.stop(OTHER)
            mesh.start(PLAIN)
            await client.wait_engines(2)
            for strategy in ("disaggregated", "balanced"):
                done = await all_of(client, strategy)
                assert bits(done) == alone, strategy
                assert {each.result.numerics for each in done} == {ours}
            mesh.stop(PLAIN)

            # Where nobody of its class is left, it goes on all the same.
            answers = await begin(client, mesh, BEST)
            mesh.start(OTHER)
            await client.wait_engines(2)
            mesh.services[BEST].kill()
            for answer in answers:
                ended = await answer.wait(60)
                assert ended.reason == "length" and len(answer.token_ids) == NUM_TOKENS
                assert answer.numerics == [ours, Numerics(MIXED)] and ended.numerics == Numerics(MIXED)

    asyncio.run(main())


def test_a_client_is_told(mesh: MeshProcesses) -> None:
    async def ask(engine: str) -> str:
        async with client_of(mesh), httpx.AsyncClient(timeout=60.0) as http:
            url = f"http://127.0.0.1:{mesh.gateway_port}/v1/completions"
            body = {"model": "tiny", "prompt": "Hello", "max_tokens": 4}
            while (reply := await http.post(url, json=body)).status_code == 503:  # one goes, the other comes
                await asyncio.sleep(float(reply.headers["retry-after"]))
            assert reply.status_code == 200, reply.text
            assert reply.headers["x-microserve-engines"] == engine
            return reply.headers["x-microserve-exact"]

    assert asyncio.run(ask(PLAIN)) == class_of(mesh, PLAIN)
    mesh.stop(PLAIN)
    mesh.start(OTHER)
    assert asyncio.run(ask(OTHER)) == "none"
