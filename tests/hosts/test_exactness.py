"""Every strategy between hosts gives the bits of a request that is alone, and nothing stays behind."""

from __future__ import annotations

import asyncio
import itertools
from contextlib import AsyncExitStack
from pathlib import Path

import httpx
import pytest
from tokenizers import Tokenizer

from microserve.protocol import log
from microserve.protocol.messages import engine as wire
from tests.support.engine.engine_client import EngineClient
from tests.support.hosts.mesh import HostMesh
from tests.support.hosts.world import World
from tests.support.process.bitwise import alone, crowd, differences, promise_of
from tests.support.process.cases import all_kinds, make_cases
from tests.support.process.exactness import PATIENT, SETTINGS, STRATEGIES

pytestmark = pytest.mark.timeout(300)


def test_every_strategy_gives_the_bits_of_a_request_alone(
    tiny_model: Path, logs: Path, world: World, vocab_size: int
) -> None:
    cases = all_kinds(make_cases(16, vocab_size=vocab_size, max_prompt=400, seed=15), vocab_size)
    with HostMesh(tiny_model, logs, world=world, settings=[*SETTINGS, *PATIENT]) as mesh:

        async def ask_all() -> list[str]:
            async with mesh.client() as client:
                reference = await alone(client, cases)
                assert promise_of(reference) is not None
                wrong = []
                for strategy in STRATEGIES:
                    got = await crowd(client, strategy, cases, salt=strategy)
                    wrong += [f"{strategy}: {each}" for each in differences(cases, reference, got)]
            await mesh.wait_until_whole()
            return wrong

        assert asyncio.run(ask_all()) == []
        events = [event for name in ("engine-0", "engine-1") for event in mesh.events(name)]
        assert sum(event["event"] == log.KV_SENT for event in events) > 50, "KV went from host to host"
        assert [event for event in events if event["event"] == log.KV_SEND_FAILED] == []


@pytest.mark.parametrize(
    "one_kernel",
    [pytest.param(False, marks=pytest.mark.slow), True],
    ids=["two machines", "two containers"],
)
def test_shared_memory_is_not_tried_between_hosts(
    one_kernel: bool, tiny_model: Path, logs: Path, tmp_path: Path
) -> None:
    """Two engines of one host put into each other's memory; those of others go through the door."""
    with (
        World(tmp_path, one_kernel=one_kernel) as world,
        HostMesh(tiny_model, logs, world=world, num_engines=3, places={"engine-2": "e0"}) as mesh,
    ):
        names = ["engine-0", "engine-1", "engine-2"]

        async def ways() -> dict[tuple[str, str], str]:
            found = {}
            with mesh.bus("router") as bus:
                async with AsyncExitStack() as stack:
                    engines = {
                        name: await stack.enter_async_context(EngineClient(bus, mesh.services[name].address))
                        for name in names
                    }
                    for number, (one, other) in enumerate(itertools.permutations(names, 2)):
                        found[one, other] = await send(engines[one], engines[other], f"r{number}")
            return found

        found = asyncio.run(ways())
        near = {("engine-0", "engine-2"), ("engine-2", "engine-0")}
        assert found == {pair: "shm" if pair in near else "tcp" for pair in itertools.permutations(names, 2)}


async def send(source: EngineClient, target: EngineClient, request_id: str) -> str:
    """The way that KV of a prompt took."""
    tokens = [20 + n % 200 for n in range(64)]  # of a cache of their own, by salt
    granted = await target.call(
        wire.Granted, wire.PrepRecv, request_id, len(tokens), 30.0, salt=request_id, tokens=tokens
    )
    sent = await source.call(
        wire.Sent,
        wire.RemoteSend,
        request_id,
        0,
        len(tokens),
        granted.grant,
        0,
        30.0,
        salt=request_id,
        tokens=tokens,
    )
    await target.call(wire.Committed, wire.Commit, request_id, granted.grant.grant_id, 30.0)
    return sent.heap


def test_a_client_of_the_gateway_gets_the_same_from_either_host(
    tiny_model: Path, logs: Path, world: World
) -> None:
    with HostMesh(tiny_model, logs, world=world, gateway=True) as mesh, world.front.inside.joined():
        body = {"model": "tiny", "prompt": "a long way from here " * 8, "max_tokens": 12, "temperature": 0.0}
        asyncio.run(_all_known(mesh))
        answers = [
            httpx.post(
                f"{mesh.gateway_url}/v1/completions",
                json=body,
                headers={"x-microserve-strategy": strategy},
                timeout=60.0,
            )
            for strategy in ("data_parallel", "disaggregated", "migrate", "balanced")
        ]
        assert {answer.status_code for answer in answers} == {200}
        texts = {answer.json()["choices"][0]["text"] for answer in answers}
        assert len(texts) == 1
        assert Tokenizer.from_file(str(tiny_model / "tokenizer.json")).encode(texts.pop()).ids


async def _all_known(mesh: HostMesh) -> None:
    async with mesh.client():
        pass
