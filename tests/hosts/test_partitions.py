"""Hosts that do not hear each other for a while: no token wrong or lost, nothing kept, and used again."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from microserve.protocol.messages.request.sampling import SamplingParams
from tests.support.bus.gateway_peer import Answer, BusClient
from tests.support.hosts.mesh import HostMesh
from tests.support.hosts.world import World

pytestmark = pytest.mark.timeout(500)

STRATEGIES = ["data_parallel", "disaggregated", "balanced", "cache_aware", "migrate", "auto"]
IN_FLIGHT = 12
TTL_S = 120.0
AGAIN_S = 60.0
LONG = SamplingParams(max_tokens=500, temperature=1.0, seed=7, ignore_eos=True)
Harm = Callable[[World], None]


def cut(world: World) -> None:
    world.cut("e0")


def lose_both_ways(world: World) -> None:
    """As behind a router that broke: unlike a pulled plug no card of ours knows of it."""
    world.lose("e0", "front")
    world.lose("front", "e0")


def lose_what_it_says(world: World) -> None:
    world.lose("e0", "front")


def lose_what_it_is_told(world: World) -> None:
    world.lose("front", "e0")


def lose_the_other_engine(world: World) -> None:
    """The front sees both engines, and they do not see each other."""
    world.lose("e0", "e1")
    world.lose("e1", "e0")


def start_all(client: BusClient, salt: str) -> list[Answer]:
    rng = random.Random(3)
    prompts = [[rng.randrange(20, 250) for _ in range(rng.randrange(50, 400))] for _ in range(IN_FLIGHT)]
    return [
        client.start(prompt, LONG, strategy=STRATEGIES[number % len(STRATEGIES)], ttl_s=TTL_S, salt=salt)
        for number, prompt in enumerate(prompts)
    ]


async def ended(answers: list[Answer]) -> list[list[int]]:
    for answer in answers:
        await answer.wait(TTL_S + 15.0)
    assert [answer.result.code for answer in answers] == [""] * len(answers)
    return [answer.token_ids for answer in answers]


async def has_engines(client: BusClient, count: int) -> None:
    async with asyncio.timeout(AGAIN_S):
        while client.num_engines != count:
            await asyncio.sleep(0.02)


async def is_used(client: BusClient, engine: str) -> None:
    """Work goes there again."""
    async with asyncio.timeout(AGAIN_S):
        for number in range(1_000):
            answer = await client.generate(
                [30 + number % 200] * 20, LONG, strategy="data_parallel", ttl_s=TTL_S
            )
            if answer.result.engines == [engine]:
                return
            await asyncio.sleep(0.02)


@pytest.mark.parametrize(
    "harm",
    [
        cut,
        pytest.param(lose_both_ways, marks=pytest.mark.slow),
        lose_what_it_says,
        pytest.param(lose_what_it_is_told, marks=pytest.mark.slow),
    ],
)
def test_an_engine_out_of_reach_costs_nothing_and_comes_back(
    harm: Harm, tiny_model: Path, logs: Path, world: World
) -> None:
    with HostMesh(tiny_model, logs, world=world) as mesh:

        async def go_through() -> None:
            async with mesh.client() as client:
                expected = await ended(start_all(client, "before"))
                during = start_all(client, "during")
                await during[0].tokens(1)
                harm(world)
                assert any(not answer.done.is_set() for answer in during)
                assert await ended(during) == expected, "those that it had are continued elsewhere"
                await has_engines(client, 1)
                assert await ended(start_all(client, "without it")) == expected
                world.heal()
                await has_engines(client, 2)
                assert await ended(start_all(client, "after")) == expected
                await is_used(client, "engine-0")
            await mesh.wait_until_whole()

        asyncio.run(go_through())
        assert all(service.process.poll() is None for service in mesh.services.values())


@pytest.mark.slow
def test_engines_that_do_not_see_each_other_serve_alone(tiny_model: Path, logs: Path, world: World) -> None:
    with HostMesh(tiny_model, logs, world=world) as mesh:

        async def go_through() -> None:
            async with mesh.client() as client:
                expected = await ended(start_all(client, "before"))
                during = start_all(client, "during")
                await during[0].tokens(1)
                lose_the_other_engine(world)
                assert any(not answer.done.is_set() for answer in during)
                assert await ended(during) == expected
                assert await ended(start_all(client, "apart")) == expected
                assert client.num_engines == 2
                world.heal()
                assert await ended(start_all(client, "after")) == expected
            await mesh.wait_until_whole()

        asyncio.run(go_through())


def test_a_host_that_vanishes_is_not_missed_and_a_new_one_takes_its_place(
    tiny_model: Path, logs: Path, world: World
) -> None:
    with HostMesh(tiny_model, logs, world=world) as mesh:

        async def lose_it() -> list[list[int]]:
            async with mesh.client() as client:
                expected = await ended(start_all(client, "before"))
                during = start_all(client, "during")
                await during[0].tokens(1)
                world.vanish("e0")
                assert any(not answer.done.is_set() for answer in during)
                assert await ended(during) == expected
                assert await ended(start_all(client, "without it")) == expected
            await mesh.wait_until_whole("engine-1")
            return expected

        async def use_it(expected: list[list[int]]) -> None:
            async with mesh.client() as client:
                assert await ended(start_all(client, "after")) == expected
                await is_used(client, "engine-0")
            await mesh.wait_until_whole()

        expected = asyncio.run(lose_it())
        world.come_back("e0")
        mesh.start("engine-0")
        asyncio.run(use_it(expected))


@pytest.mark.slow
def test_a_router_apart_from_its_index_finds_it_again(tiny_model: Path, logs: Path, tmp_path: Path) -> None:
    """And no connection of before is kept: the kernel's own patience with one is a quarter of an hour."""
    with World(tmp_path, ["front", "e0", "e1", "apart"]) as world:
        mesh = HostMesh(tiny_model, logs, world=world, places={"router": "apart"})

        def connections() -> int:
            """Those of the front with the router's host that are thought to stand."""
            table = world.front.inside.do("cat", "/proc/net/tcp").splitlines()[1:]
            number = "".join(f"{int(part):02X}" for part in reversed(world["apart"].address.split(".")))
            return sum(line.split()[2].startswith(number) and line.split()[3] == "01" for line in table)

        async def go_through() -> None:
            async with mesh.client() as client:
                expected = await ended(start_all(client, "before"))
                assert connections() > 0
                world.lose("apart", "front")
                world.lose("front", "apart")
                deadline = time.monotonic() + AGAIN_S
                while connections():
                    assert time.monotonic() < deadline
                    await asyncio.sleep(0.2)
                assert "index.lost" in [event["event"] for event in mesh.events("router")]
                world.heal()
            async with mesh.client() as client:
                assert await ended(start_all(client, "after")) == expected
                async with asyncio.timeout(AGAIN_S):
                    while [e["event"] for e in mesh.events("router")].count("index.joined") < 2:
                        await asyncio.sleep(0.1)

        with mesh:
            asyncio.run(go_through())
