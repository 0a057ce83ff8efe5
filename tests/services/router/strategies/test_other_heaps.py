"""A mesh whose engines have heaps of two kinds: what cannot be sent is served without the send."""

from __future__ import annotations

import asyncio

import pytest

from microserve.protocol.errors import TransferFailed
from microserve.protocol.messages import engine as wire
from microserve.services.router.strategies import BUILT_IN
from tests.support.router.router_world import World, expected_output, router_world
from tests.support.router.scripted_engine import ScriptedEngine

pytestmark = pytest.mark.slow

PROMPT = list(range(40))


def part(world: World, on_gpu: set[str]) -> None:
    """Sends between the two kinds fail as ``Heap.attach`` does; all others work."""
    for engine in world.engines.values():
        _refuse(engine, on_gpu)


def _refuse(engine: ScriptedEngine, on_gpu: set[str]) -> None:
    handle = engine._handle

    def refusing(message: wire.EngineRequest) -> wire.EngineReply | None:
        if isinstance(message, wire.RemoteSend):
            receiver = message.grant.engine_id
            if (receiver in on_gpu) != (engine.engine_id in on_gpu):
                raise TransferFailed("a shm heap on host h is out of reach of a cuda_ipc heap")
        return handle(message)

    engine._handle = refusing  # type: ignore[method-assign]


@pytest.mark.parametrize("strategy", [strategy.name for strategy in BUILT_IN])
@pytest.mark.parametrize(
    ("engines", "labels"),
    [
        ("ab", {}),
        ("ab", {"a": ["decode"], "b": ["prefill"]}),
        ("abcd", {}),
        # Whichever of them prefills, its KV does not reach the one that decodes.
        ("acegb", {name: ["prefill"] for name in "aceg"} | {"b": ["decode"]}),
        ("acegb", {name: ["decode"] for name in "aceg"} | {"b": ["prefill"]}),
    ],
    ids=["two", "roles", "four", "one against four", "four against one"],
)
def test_every_strategy_serves_it_all_the_same(
    strategy: str, engines: str, labels: dict[str, list[str]]
) -> None:
    async def run() -> None:
        async with router_world(*engines, labels=labels) as world:
            part(world, set("bd"))
            for _ in range(4):
                ended = await world.gateway.generate(PROMPT, strategy=strategy)
                assert (ended.result.reason, ended.result.code) == ("length", "")
                assert ended.token_ids and ended.token_ids == expected_output(len(ended.token_ids))
            await world.check_clean()

    asyncio.run(run())
