"""Who asks, as a strategy sees it: in every attempt, to nobody else's harm, and bounded."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from microserve.protocol.messages import engine as wire
from microserve.services.router.authoring import Chunks, Mesh, Request
from tests.support.router.router_world import eventually, in_loop, router_world, serve_with, start_with

PROMPT = list(range(50))


@in_loop
async def test_a_strategy_chooses_by_them_before_and_after_a_failover() -> None:
    seen: list[Mapping[str, str]] = []

    async def body(mesh: Mesh, request: Request) -> Chunks:
        seen.append(request.attributes)
        yield mesh.pick(request.attributes.get("header.x-tier"), request).start_generate(request)

    async with router_world("a", "b", labels={"a": ["gold"], "b": ["gold"]}) as world:
        for engine in world.engines.values():
            engine.manual = True
        answer = world.gateway.start(
            PROMPT,
            strategy=start_with(world, body),
            tenant="t",
            priority=3,
            attributes={"header.x-tier": "gold", "user": "u"},
        )
        await eventually(lambda: any(engine.of(wire.StartGenerate) for engine in world.engines.values()))
        chosen = next(engine for engine in world.engines.values() if engine.of(wire.StartGenerate))
        other = next(engine for engine in world.engines.values() if engine is not chosen)
        other.manual = False
        chosen.die()
        assert (await answer.wait()).reason == "length"
        assert len(seen) == 2
    expected = {"header.x-tier": "gold", "user": "u", "tenant": "t", "priority": "3"}
    assert seen == [expected] * len(seen)
    with pytest.raises(TypeError):
        seen[0]["user"] = "another"  # type: ignore[index]


@pytest.mark.parametrize(
    ("attributes", "what"),
    [
        ({str(number): "" for number in range(17)}, "17 attributes, at most 16"),
        ({"": "v"}, "name has 1 to 80 characters, not 0"),
        ({"n" * 81: "v"}, "1 to 80 characters, not 81"),
        ({"user": "v" * 513}, "user has 513 characters, at most 512"),
        ({"tenant": "other"}, "tenant has a field of its own"),
    ],
)
def test_what_is_out_of_bounds_is_refused(attributes: dict[str, str], what: str) -> None:
    @in_loop
    async def main() -> None:
        async def body(mesh: Mesh, request: Request) -> Chunks:
            yield mesh.pick(None, request).start_generate(request)

        async with router_world("a") as world:
            answer = await serve_with(world, body, PROMPT, attributes=attributes)
            assert answer.ended is not None
            assert (answer.ended.code, answer.ended.field) == ("invalid_request", "attributes")
            assert what in answer.ended.detail
            assert world.calls() == []

    main()
