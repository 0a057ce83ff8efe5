"""Where an engine is bound and what it says of that: every interface, another host, loopback by mistake."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from microserve.protocol.messages.request.sampling import SamplingParams
from tests.support.hosts.mesh import MICROSERVE, HostMesh
from tests.support.hosts.world import World

pytestmark = pytest.mark.timeout(200)

SOCKETS = ("address", "events_address", "replay_address")
GREEDY = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)


def bound_to(host: str, *more: str) -> list[str]:
    return [*(f"engine.{name}=tcp://{host}:0" for name in SOCKETS), *more]


def test_what_is_bound_to_every_interface_is_found_by_the_way_to_the_index(
    tiny_model: Path, logs: Path, world: World
) -> None:
    own = {
        "engine-0": bound_to("0.0.0.0"),
        "engine-1": bound_to("*", f"engine.advertise={world['e1'].address}"),
    }
    with HostMesh(tiny_model, logs, world=world, own_settings=own) as mesh:
        for name in own:
            assert mesh.services[name].address.startswith(f"tcp://{mesh.host_of(name)}:")

        async def ask() -> None:
            async with mesh.client() as client:
                prompt = list(range(20, 120))
                one, two = [
                    (await client.generate(prompt, GREEDY, strategy=each)).token_ids
                    for each in ("data_parallel", "disaggregated")
                ]
                assert one == two and len(one) == 6
            # Events and snapshots come by the other two addresses.
            async with asyncio.timeout(60):
                while sum(e["event"] == "index.resynced" for e in mesh.events("index")) < 2:
                    await asyncio.sleep(0.05)

        asyncio.run(ask())


def test_an_engine_that_the_index_cannot_reach_says_so_and_ends(
    tiny_model: Path, logs: Path, world: World
) -> None:
    """The first mistake of everybody with two hosts: its sockets are on loopback by default."""
    mesh = HostMesh(tiny_model, logs, world=world)
    line = [*MICROSERVE, "engine", "--set", f"model.path={tiny_model}"]
    line += ["--set", f"index.address={mesh.index_address}"]
    line += ["--set", f"bus.curve_dir={world['e0'].directory / 'keys'}"]
    done = world["e0"].inside.run(*line)
    assert done.returncode == 2, done.stdout
    said = [json.loads(each) for each in done.stdout.splitlines() if each.startswith("{")] or [done.stdout]
    assert "engine.address" in str(said[-1]) and f"tcp://{world['e0'].address}:0" in str(said[-1])
