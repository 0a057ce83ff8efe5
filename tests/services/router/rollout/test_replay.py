"""What another strategy would decide on the state that a record has: every shipped one, and mistaken ones."""

from __future__ import annotations

import msgspec
import pytest

from microserve.protocol.messages.kv.geometry import Geometry
from microserve.protocol.messages.strategy.decisions import Explanation
from microserve.services.router.authoring.action.generating import Chunks
from microserve.services.router.authoring.definition import Strategy
from microserve.services.router.authoring.mesh import Mesh
from microserve.services.router.request.request import Request
from microserve.services.router.rollout.replay import Replayed, replay
from microserve.services.router.strategies import BUILT_IN
from microserve.services.router.strategies.placing.data_parallel import data_parallel
from tests.support.router.router_world import in_loop, router_world

PROMPT = list(range(48))
LABELS = {"d": ["decode"], "p": ["prefill"]}


async def recorded(strategy: str) -> Explanation:
    async with router_world("d", "p", labels=LABELS) as world:
        await world.gateway.generate(PROMPT, strategy=strategy, request_id="r", attributes={"user": "u"})
        [found], _ = world.router.serving.explain("r")
        return found


async def replayed(strategy: Strategy, found: Explanation) -> Replayed:
    return await replay(strategy, found, found.attempts[0])


@pytest.mark.parametrize("strategy", BUILT_IN, ids=lambda each: each.name)
def test_every_shipped_strategy_decides_on_a_record(strategy: Strategy) -> None:
    @in_loop
    async def main() -> None:
        made = await replayed(strategy, await recorded("disaggregated"))
        assert made.mistake == "" and made.engine_id in ("d", "p")
        assert made.choices and made.ttft_s is not None and made.done_ttft_s is not None

    main()


@in_loop
async def test_the_same_strategy_decides_the_same_where_no_lot_is_drawn() -> None:
    found = await recorded("disaggregated")
    own = next(each for each in BUILT_IN if each.name == "disaggregated")
    made = await replayed(own, found)
    done = found.attempts[0]
    assert made.is_same_engine and (made.engine_id, made.begin) == (done.engine_id, done.begin)
    assert made.sends == done.sends


def mine(body: object) -> Strategy:
    return Strategy("mine", body, {}, {}, "")  # type: ignore[arg-type]


@in_loop
async def test_it_sees_what_was_known_then_and_no_more() -> None:
    seen: dict[str, object] = {}

    async def looks(mesh: Mesh, request: Request) -> Chunks:
        engines = mesh.engines("decode")
        seen.update(
            ids=[e.id for e in engines], tokens={*request.tokens}, attributes=dict(request.attributes)
        )
        yield engines[0].start_generate(request)

    found = await recorded("data_parallel")
    assert (await replayed(mine(looks), found)).engine_id == "d"
    assert seen["ids"] == ["d"] and seen["tokens"] == {0}
    assert seen["attributes"] == {"user": "", "tenant": "", "priority": "0"}


@in_loop
async def test_an_engine_does_what_it_did_then_and_no_more() -> None:
    """What it can, where sends from it meet, its geometry: as the record has them."""
    shape = Geometry("bfloat16", "rows", 16, 30, 3, 64)

    async def sends(mesh: Mesh, request: Request) -> Chunks:
        a, b = (next(e for e in mesh.engines() if e.id == name) for name in "ab")
        grant = await a.prep_recv(request, end=32)
        b.remote_send(request, grant, begin=grant.matched, end=grant.end)
        yield a.start_generate(request, begin=grant.end, grant=grant)

    for ability, mistake in (("prep_recv", "engine b (vllm) does no remote_send"), ("remote_send", "")):
        async with router_world() as world:
            world.add_engine("a", geometry=shape, can=["prep_recv", "remote_send"])
            world.add_engine("b", geometry=shape, can=[ability], split_tokens=16, backend="vllm")
            await world.list_engines()
            await world.gateway.generate(PROMPT, strategy="data_parallel", request_id="r")
            [found], _ = world.router.serving.explain("r")
        [seen] = [each for each in found.attempts[0].engines if each.engine_id == "b"]
        assert (seen.can, seen.geometry, seen.split_tokens) == ([ability], shape, 16)
        assert seen.backend == "vllm"
        made = await replayed(mine(sends), found)
        assert mistake in made.mistake and bool(made.mistake) == bool(mistake), made
        assert made.unknown == []
    [attempt] = found.attempts
    other = Geometry("float32", "rows", 16, 30, 3, 64)
    engines = [msgspec.structs.replace(e, geometry=other) if e is seen else e for e in attempt.engines]
    made = await replay(mine(sends), found, msgspec.structs.replace(attempt, engines=engines))
    assert "float32" in made.mistake


@in_loop
async def test_of_a_record_without_abilities_it_is_said_that_they_are_not_known() -> None:
    found = await recorded("data_parallel")
    [attempt] = found.attempts
    old = [msgspec.structs.replace(seen, can=None) for seen in attempt.engines]
    made = await replay(data_parallel, found, msgspec.structs.replace(attempt, engines=old))
    assert made.mistake == "" and made.unknown == ["d", "p"]


@in_loop
async def test_a_mistake_is_told_and_so_is_a_record_without_engines() -> None:
    async def mistaken(mesh: Mesh, request: Request) -> Chunks:
        raise ValueError("boo")
        yield

    found = await recorded("data_parallel")
    assert (await replayed(mine(mistaken), found)).mistake == "ValueError: boo"
    bare = found.attempts[0].__class__("move", 0, 0.0, 48, {}, [], [], 0, [], 0, [], "d", 48, False)
    assert "no record of engines" in (await replay(data_parallel, found, bare)).mistake
