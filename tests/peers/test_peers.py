"""Other people's indexers and routers, as they are: they follow our engines and send requests to our gateway.

``make peers`` runs all. Each folder here says which versions. The engine is the real prefix cache behind the
real publisher; where a peer is a router, the gateway is real, with a router behind it that the test plays.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from microserve.kvcache.prefix.index import PrefixIndex
from microserve.protocol.messages.kv.kv_decoding import decode_batch
from microserve.protocol.messages.kv.kv_events import BlockRemoved, BlockStored
from tests.support.gateway.gateway_world import GatewayWorld, Served, gateway_world
from tests.support.index.index_world import BLOCK_SIZE, Engine, World, in_world
from tests.support.peers.environment import Peer
from tests.support.peers.running import answers, running
from tests.support.process.processes import free_port

pytestmark = [pytest.mark.timeout(1200)]
READER = Path(__file__).parents[1] / "support/peers/reader.py"
NUM_PROMPTS = 60
BEAT_S = 0.02


def prompt(number: int) -> list[int]:
    """Beginnings are shared by five; more prompts than a cache of 64 blocks has room for."""
    group, own = number % 5, number % 30
    return [100 + group] * 2 * BLOCK_SIZE + [200 + own] * (own % 3 + 1) * BLOCK_SIZE


@asynccontextmanager
async def working(engine: Engine) -> AsyncIterator[Callable[[], Awaitable[None]]]:
    """The engine beats meanwhile; what is yielded computes all prompts, so that old ones are evicted."""

    async def beat() -> None:
        while True:
            engine.publisher.beat()
            await asyncio.sleep(BEAT_S)

    async def work() -> None:
        for number in range(NUM_PROMPTS):
            engine.compute(prompt(number))
            await asyncio.sleep(0.005)

    beating = asyncio.create_task(beat())
    try:
        yield work
    finally:
        beating.cancel()


def held(engine: Engine) -> PrefixIndex:
    """What the engine's cache has now."""
    index = PrefixIndex(BLOCK_SIZE, engine.info.model, 1 << 22)
    index.replace("e1", decode_batch(engine.snapshot_events()).events)
    return index


def names(engine: Engine) -> list[int]:
    """Of the blocks in it, as others know them."""
    stored = [each for each in decode_batch(engine.snapshot_events()).events if isinstance(each, BlockStored)]
    return sorted(int.from_bytes(name[8:], "big") for each in stored for name in each.block_hashes)  # type: ignore[index]


def test_dynamos_indexer_finds_what_the_engine_holds(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        engine = world.engine()
        engine.compute(prompt(0))
        port = free_port()
        command = [str(peer.python), "-m", "dynamo.indexer", "--port", str(port), "--threads", "1"]
        async with (
            running(command, tmp_path / "log"),
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http,
            working(engine) as work,
        ):
            await answers(http, "/health")
            where = {"endpoint": engine.info.events_address, "replay_endpoint": engine.info.replay_address}
            about = {"instance_id": 1, "model_name": "m", "block_size": BLOCK_SIZE}
            assert (await http.post("/register", json=where | about)).status_code == 201
            await work()
            truth = held(engine)
            expected = [truth.lookup(prompt(number)).get("e1", 0) for number in range(30)]
            lengths = [len(prompt(number)) for number in range(30)]
            assert any(map(int.__lt__, expected, lengths)), "nothing was evicted"
            found: list[int] = []
            async with asyncio.timeout(60):
                while found != expected:
                    found = [await score(http, prompt(number)) for number in range(30)]

    async def score(http: httpx.AsyncClient, tokens: list[int]) -> int:
        reply = await http.post("/query", json={"token_ids": tokens, "model_name": "m"})
        return int(reply.json()["scores"].get("1", {}).get("0", 0))

    peer = Peer("dynamo")
    with peer.environment():
        in_world(test)


def test_sglangs_classes_read_live_and_by_replay(tmp_path: Path) -> None:
    peer = Peer("sglang")
    with peer.environment():
        read_by("sglang", str(peer.python), tmp_path)


@pytest.mark.vllm
def test_vllms_classes_read_live_and_by_replay(vllm_python: Path, tmp_path: Path) -> None:
    read_by("vllm", str(vllm_python), tmp_path)


def read_by(package: str, python: str, directory: Path) -> None:
    async def test(world: World) -> None:
        engine = world.engine()
        engine.compute(prompt(0))
        where = [engine.info.events_address, engine.info.replay_address]
        async with running([python, str(READER), package, *where], directory / "log") as process:
            assert process.stdin is not None and process.stdout is not None

            async def report() -> Any:
                process.stdin.write(b"\n")  # type: ignore[union-attr]
                async with asyncio.timeout(120):
                    return json.loads(await process.stdout.readline())  # type: ignore[union-attr]

            async with working(engine) as work:
                said = await report()
                assert said["held"] == names(engine)
                while said["live"] < 20:  # it is there, and throws some away
                    await work()
                    said = await report()
                assert said["held"] == names(engine)
                assert said["replayed"] > 0
                engine.clear()
                engine.publisher.publish([BlockRemoved([])])
                assert (await report())["held"] == []

    in_world(test)


def answer_at_once(served: Served) -> None:
    served.send([5, 6])
    served.end()


def test_vllm_router_prefers_the_worker_that_holds_the_prompt(tmp_path: Path, tiny_model: Path) -> None:
    """``kv_aware`` refuses keys that it does not know: ``engine.events_strict`` and an empty topic."""
    peer = Peer("vllm_router")

    async def test(world: World) -> None:
        async with gateway_world(tiny_model) as one, gateway_world(tiny_model) as two:
            workers = {one.address: world.engine(topic="", strict=True)}
            workers[two.address] = world.engine("e2", topic="", strict=True)
            command = [str(peer.home / "bin/vllm-router"), "--host", "127.0.0.1", "--policy", "kv_aware"]
            command += ["--port", str(port := free_port()), "--prometheus-port", str(seen := free_port())]
            command += ["--kv-event-block-size", str(BLOCK_SIZE), "--kv-event-model", "tiny"]
            command += ["--worker-urls", *workers]
            for url, engine in workers.items():
                command += ["--kv-event-source", f"{url}={engine.info.events_address}"]
                command += ["--kv-event-replay-source", f"{url}={engine.info.replay_address}"]
            for gateway in (one, two):
                gateway.routers[0].answer = answer_at_once
            async with (
                running(command, tmp_path / "log"),
                httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as http,
                httpx.AsyncClient(base_url=f"http://127.0.0.1:{seen}") as metrics,
                working(workers[one.address]),
                working(workers[two.address]),
            ):
                await answers(http, "/v1/models")
                text = "A prompt that one of the workers has computed before. " * 3
                told = await http.post("/tokenize", json={"model": "tiny", "prompt": text})
                tokens = told.json()["tokens"]
                workers[two.address].compute(tokens[: len(tokens) // BLOCK_SIZE * BLOCK_SIZE])
                async with asyncio.timeout(60):
                    while 'lookups_total{result="hit"}' not in (await metrics.get("/metrics")).text:
                        await complete(http, text)
                before = served_by(one), served_by(two)
                for _ in range(5):
                    await complete(http, text)
                assert (served_by(one), served_by(two)) == (before[0], before[1] + 5)

    async def complete(http: httpx.AsyncClient, text: str) -> None:
        body = {"model": "tiny", "prompt": text, "max_tokens": 2}
        assert (await http.post("/v1/completions", json=body)).status_code == 200

    with peer.environment():
        in_world(test)


def served_by(gateway: GatewayWorld) -> int:
    return len(gateway.routers[0].served)


def test_sglangs_router_knows_our_gateway_and_its_model(tmp_path: Path, tiny_model: Path) -> None:
    peer = Peer("sglang_router")

    async def test(world: World) -> None:
        async with gateway_world(tiny_model) as gateway:
            gateway.routers[0].answer = answer_at_once
            command = [str(peer.python), "-m", "sglang_router.launch_router", "--host", "127.0.0.1"]
            command += ["--port", str(port := free_port()), "--prometheus-port", str(free_port())]
            command += ["--worker-urls", gateway.address, "--health-check-endpoint", "/ready"]
            async with (
                running(command, tmp_path / "log"),
                httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as http,
            ):
                await answers(http, "/v1/models")
                shown = ""
                async with asyncio.timeout(60):
                    while "tiny" not in shown:
                        shown = (await http.get("/workers")).text
                assert "unknown" not in shown
                body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
                reply = await http.post("/v1/chat/completions", json=body)
                assert (reply.status_code, reply.json()["model"]) == (200, "tiny")

    with peer.environment():
        in_world(test)
