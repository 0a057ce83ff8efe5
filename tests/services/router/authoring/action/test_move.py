"""A strategy moves an answer that runs: its KV goes along, its tokens go on, and nothing is left behind."""

from __future__ import annotations

import pytest

from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.numerics import Numerics
from microserve.services.router.authoring import Chunks, Mesh, Request
from tests.support.bus.gateway_peer import Answer
from tests.support.router.router_world import World, expected_output, in_loop, router_world, start_with
from tests.support.router.scripted_engine import BLOCK_SIZE, output_token

PROMPT = list(range(50))
LIVE: list[tuple[Mesh, Request]] = []


async def kept(mesh: Mesh, request: Request) -> Chunks:
    LIVE[:] = [(mesh, request)]
    engine = next(engine for engine in mesh.engines() if engine.id == "a")
    yield engine.start_generate(request)


async def begun(world: World, count: int) -> Answer:
    world.engines["a"].manual = True
    answer = world.gateway.start(PROMPT, max_tokens=40, strategy=start_with(world, kept))
    await world.engines["a"].saw(wire.StartGenerate)
    if count:
        tokens = [output_token(position) for position in range(count)]
        world.engines["a"].emit(wire.Delta(answer.request_id, 0, tokens))
        await answer.tokens(count)
    return answer


def to(name: str) -> bool:
    mesh, request = LIVE[0]
    return mesh.move(request, next(engine for engine in mesh.engines() if engine.id == name))


@pytest.mark.parametrize("count", [1, 14, 30])
def test_its_kv_goes_along_and_its_tokens_go_on(count: int) -> None:
    @in_loop
    async def main() -> None:
        async with router_world("a", "b", "c") as world:
            answer = await begun(world, count)
            assert not to("a"), "it is there"
            assert to("b")
            ended = await answer.wait()
            assert (ended.reason, answer.token_ids) == ("length", expected_output(40))
            assert ended.engines == ["a", "b"]
            [send] = world.engines["a"].of(wire.RemoteSend)
            assert send.end == (50 + count - 1) // BLOCK_SIZE * BLOCK_SIZE
            assert not world.engines["c"].calls
            assert not to("c"), "it is over"

    main()


@in_loop
async def test_there_must_be_something_to_move() -> None:
    async with router_world("a", "b") as world:
        answer = await begun(world, 0)
        assert not to("b")
        world.engines["a"].finish(answer.request_id, 0, reason="stop")
        assert (await answer.wait()).reason == "stop"
        assert not world.engines["b"].calls


@in_loop
async def test_an_exact_answer_stays_in_its_class() -> None:
    async with router_world() as world:
        for name, numerics in (("a", "n1"), ("b", "n2")):
            world.add_engine(name, numerics=Numerics(numerics, is_exact=True))
        await world.list_engines()
        answer = await begun(world, 2)
        with pytest.raises(Exception, match="another numerics class"):
            to("b")
        world.engines["a"].manual = False
        world.engines["a"].finish(answer.request_id, 2, reason="stop")
        assert (await answer.wait()).reason == "stop"


@in_loop
async def test_a_target_that_is_lost_on_the_way_costs_no_token() -> None:
    async with router_world("a", "b", "c") as world:
        answer = await begun(world, 20)
        world.engines["b"].paused.add("PrepRecv")
        assert to("b")
        await world.engines["b"].saw(wire.PrepRecv)
        world.engines["a"].manual = False
        world.engines["b"].die()
        assert (await answer.wait()).reason == "length"
        assert answer.token_ids == expected_output(40)
