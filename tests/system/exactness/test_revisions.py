"""A model's name stands for what was loaded: another one under the same name is never mixed in."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from microserve.protocol import log
from microserve.protocol.bus.transport import ZmqBus
from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.services.router.strategies import BUILT_IN
from tests.support.bus.gateway_peer import BusClient
from tests.support.engine.model.tiny_model import make_tiny_model
from tests.support.process.processes import MeshProcesses

pytestmark = [pytest.mark.system, pytest.mark.timeout(240)]

GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
PROMPTS = [list(range(first, first + 70)) for first in (20, 40, 60)]
SETTINGS = ["model.name=tiny"]


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60.0
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def refusals(mesh: MeshProcesses, name: str) -> list[str]:
    return [str(event["error"]) for event in mesh.events(name) if event["event"] == log.ENGINE_REFUSED]


async def answers(mesh: MeshProcesses, strategy: str) -> list[list[int]]:
    bus = ZmqBus(linger_s=0.1)
    try:
        async with BusClient(bus, mesh.router_address) as client:
            await client.wait_engines(1)
            # Twice: what was received the first time is a prefix hit the second.
            done = [await client.generate(each, GREEDY, strategy=strategy) for each in [*PROMPTS, *PROMPTS]]
            assert [each.reason for each in done] == ["length"] * len(done)
            return [each.token_ids for each in done]
    finally:
        bus.close()


@pytest.mark.parametrize("how", ["another directory of that name", "files that changed"])
def test_the_second_revision_is_refused_at_the_door(tmp_path: Path, how: str) -> None:
    """F1 and F2; and when the old one has left, the new one is in by itself."""
    old = make_tiny_model(tmp_path / "old" / "tiny")
    new = make_tiny_model(tmp_path / "new" / "tiny", seed=1)
    own = [f"model.path={new}"] if how == "another directory of that name" else []
    with MeshProcesses(old, tmp_path, num_engines=1, settings=SETTINGS, engine_settings={1: own}) as mesh:
        expected = asyncio.run(answers(mesh, "data_parallel"))
        if not own:
            for file in new.iterdir():  # in place, under the engine that serves it
                (old / file.name).write_bytes(file.read_bytes())
        mesh.start("engine-1")
        until(lambda: bool(refusals(mesh, "engine-1")), "engine-1 says that it is refused")
        [why] = refusals(mesh, "engine-1")
        assert why.startswith("engine-1 has revision '") and "', engine-0 has '" in why
        until(lambda: refusals(mesh, "index") == [why], "the index says why")
        assert refusals(mesh, "router") in ([], [why])
        for strategy in BUILT_IN:
            assert asyncio.run(answers(mesh, strategy.name)) == expected, strategy.name
        assert mesh.services["engine-1"].process.poll() is None

        mesh.stop("engine-0")
        until(lambda: _joined(mesh, "engine-1"), "engine-1 is let in")
        changed = asyncio.run(answers(mesh, "data_parallel"))
        assert all(ours != theirs for ours, theirs in zip(changed, expected, strict=True))


def _joined(mesh: MeshProcesses, name: str) -> bool:
    return any(e["event"] == log.ENGINE_JOINED and e["engine_id"] == name for e in mesh.events("router"))
