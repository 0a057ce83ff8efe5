"""KV that is under way when the network is slow, breaks, or an end of it is gone: by a model with much KV."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from microserve.protocol import log
from microserve.protocol.messages.request.sampling import SamplingParams
from tests.support.bus.gateway_peer import BusClient
from tests.support.engine.model.tiny_model import make_tiny_model
from tests.support.hosts.mesh import HostMesh
from tests.support.hosts.world import World

pytestmark = pytest.mark.timeout(300)

PROMPT = 1_200
TOKEN_NBYTES = 8_192
"""Of KV: four layers, K and V, 8 heads of 64, two bytes each. So a prompt has 10 MB."""
TTL_S = 120.0
PARAMS = SamplingParams(max_tokens=12, temperature=0.7, seed=5, ignore_eos=True)
SMALL = ["kvcache.num_blocks=600", "kvcache.door_silence_s=3", "router.call_timeout_s=60"]


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape: dict[str, Any] = {
        "hidden_size": 64,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": 64,
    }
    return make_tiny_model(tmp_path_factory.mktemp("wide") / "wide", num_hidden_layers=4, **shape)


def prompt_of(seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(20, 250) for _ in range(PROMPT)]


async def ask(client: BusClient, seed: int, strategy: str, salt: str) -> list[int]:
    answer = await client.generate(prompt_of(seed), PARAMS, strategy=strategy, ttl_s=TTL_S, salt=salt)
    assert answer.reason == "length", answer.ended
    return answer.token_ids


def sent_nbytes(mesh: HostMesh) -> int:
    """KV that has gone from engine to engine, as engines tell it."""
    events = [event for name in ("engine-0", "engine-1") for event in mesh.events(name)]
    return sum(int(str(event["nbytes"])) for event in events if event["event"] == log.KV_SENT)


@pytest.mark.parametrize("mbit_s", [pytest.param(10, marks=pytest.mark.slow), 100, 1000])
def test_a_slow_link_costs_time_and_nothing_else(
    mbit_s: int, wide_model: Path, logs: Path, world: World
) -> None:
    """No engine is thought to be lost because its heartbeats wait behind KV."""
    with HostMesh(wide_model, logs, world=world, settings=SMALL) as mesh:

        async def go_through() -> None:
            async with mesh.client() as client:
                expected = [await ask(client, seed, "data_parallel", f"alone {seed}") for seed in range(2)]
                for host in mesh.engine_hosts:
                    world.slow(host, mbit_s)
                kinds = ("disaggregated", "balanced")
                async with asyncio.TaskGroup() as tasks:
                    asked = [
                        (seed, tasks.create_task(ask(client, seed, kind, f"{kind} {seed}")))
                        for kind in kinds
                        for seed in range(2)
                    ]
                assert [task.result() for _, task in asked] == [expected[seed] for seed, _ in asked]
            await mesh.wait_until_whole()

        asyncio.run(go_through())
        assert sent_nbytes(mesh) > PROMPT * TOKEN_NBYTES
        lost = [event for event in mesh.events("router") if event["event"] == log.ENGINE_LOST]
        assert lost == []


def break_link(world: World, source: str, target: str) -> None:
    world.lose(source, target)
    world.lose(target, source)


def deafen(world: World, source: str, target: str) -> None:
    """What the writer sends arrives, and it hears of nothing."""
    world.lose(target, source)


def vanish_writer(world: World, source: str, target: str) -> None:
    world.vanish(source)


def vanish_owner(world: World, source: str, target: str) -> None:
    world.vanish(target)


@pytest.mark.parametrize(
    "harm",
    [
        break_link,
        pytest.param(deafen, marks=pytest.mark.slow),
        vanish_writer,
        pytest.param(vanish_owner, marks=pytest.mark.slow),
    ],
)
def test_a_transfer_that_breaks_off_leaves_nothing(
    harm: Callable[[World, str, str], None], wide_model: Path, logs: Path, world: World
) -> None:
    """In its midst: of 10 MB at 50 Mbit/s some have come. Blocks are free again once the door has proof."""
    with HostMesh(wide_model, logs, world=world, settings=SMALL) as mesh:

        async def go_through() -> None:
            async with mesh.client() as client:
                expected = [await ask(client, seed, "data_parallel", f"alone {seed}") for seed in range(2)]
                for host in mesh.engine_hosts:
                    world.slow(host, 50)
                before = {host: world[host].traffic().received_nbytes for host in mesh.engine_hosts}
                asked = asyncio.create_task(ask(client, 0, "disaggregated", "broken"))
                target = None
                while target is None:
                    assert not asked.done()
                    await asyncio.sleep(0.01)
                    come = {h: world[h].traffic().received_nbytes - before[h] for h in before}
                    target = next((host for host, nbytes in come.items() if nbytes > 1_000_000), None)
                source = next(host for host in mesh.engine_hosts if host != target)
                harm(world, source, target)
                assert await asked == expected[0]
                assert await ask(client, 1, "disaggregated", "apart") == expected[1], "others are served"
            await mesh.wait_until_whole()  # while it is still broken: by proof, not by healing
            world.heal()

        asyncio.run(go_through())


@pytest.mark.slow
@pytest.mark.parametrize("mtu_nbytes", [1500, 9000])
def test_what_goes_over_the_wire_is_kv(
    mtu_nbytes: int, wide_model: Path, logs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And what Ethernet, IP and TCP put around it: 66 bytes a frame, 4.6 % of frames of 1,500 bytes."""
    with (
        World(tmp_path, mtu_nbytes=mtu_nbytes, real_frames=True) as world,
        HostMesh(wide_model, logs, world=world, settings=SMALL) as mesh,
    ):

        async def measure() -> tuple[int, int]:
            async with mesh.client() as client:
                for host in mesh.engine_hosts:
                    world.slow(host, 200)
                before = sum(world[host].traffic().sent_nbytes for host in mesh.engine_hosts)
                for seed in range(4):
                    await ask(client, seed, "disaggregated", "")
                after = sum(world[host].traffic().sent_nbytes for host in mesh.engine_hosts)
                return sent_nbytes(mesh), after - before

        kv_nbytes, wire_nbytes = asyncio.run(measure())
    around = 66 / (mtu_nbytes - 52)
    with capsys.disabled():
        print(
            f"\nMTU {mtu_nbytes}: {kv_nbytes} bytes of KV, {wire_nbytes} bytes on the wire "
            f"(+{wire_nbytes / kv_nbytes - 1:.2%}; headers alone +{around:.2%})"
        )
    assert kv_nbytes >= 4 * (PROMPT - 1) * TOKEN_NBYTES
    assert wire_nbytes <= kv_nbytes * (1.02 + (around if mtu_nbytes == 1500 else 0.0))
