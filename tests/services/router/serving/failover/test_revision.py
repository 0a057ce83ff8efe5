"""No answer is of two models: one that another revision has begun ends where it is."""

from __future__ import annotations

import pytest

from microserve.protocol.messages import engine as wire
from tests.support.router.router_world import eventually, expected_output, in_loop, router_world

PROMPT = list(range(50))


@in_loop
async def test_a_rolling_update_under_a_stream() -> None:
    """The last engine of the old revision dies, and the new one is let in while the request waits."""
    async with router_world() as world:
        a = world.add_engine("a", revision="old")
        await world.list_engines()
        a.manual = True
        answer = world.gateway.start(PROMPT)
        await a.saw(wire.StartGenerate)
        a.emit(wire.Delta(answer.request_id, 0, expected_output(2)))
        await answer.tokens(2)
        b = world.add_engine("b", revision="new")
        a.die()
        await world.list_engines(b)
        ended = await answer.wait()
        assert (ended.reason, ended.code) == ("error", "engine_lost")
        assert "old had begun the answer, new is here" in ended.detail
        assert answer.token_ids == expected_output(2)
        assert not b.of(wire.StartGenerate)
        assert (await world.gateway.generate(PROMPT)).token_ids == expected_output(4)
        await eventually(b.is_clean, "b holds nothing")


@in_loop
async def test_a_request_without_output_yet_goes_on_with_the_new_one() -> None:
    async with router_world() as world:
        a = world.add_engine("a", revision="old")
        await world.list_engines()
        a.manual = True
        answer = world.gateway.start(PROMPT)
        await a.saw(wire.StartGenerate)
        b = world.add_engine("b", revision="new")
        a.die()
        await world.list_engines(b)
        assert (await answer.wait()).reason == "length"
        assert answer.token_ids == expected_output(4)


@pytest.mark.parametrize(("said", "code"), [("old", "engine_lost"), ("new", ""), ("", "")])
@in_loop
async def test_output_that_another_router_delivered(said: str, code: str) -> None:
    """A gateway says whose it is; one of before it could is served as ever."""
    async with router_world() as world:
        world.add_engine("a", revision="new")
        await world.list_engines()
        await world.beats(1)
        assert world.gateway.heartbeats[-1].revision == "new"
        answer = await world.gateway.generate(PROMPT, output=expected_output(2), revision=said)
        assert answer.result.code == code
        assert answer.token_ids == expected_output(2 if code else 4)
        assert bool(world.engines["a"].calls) is not bool(code)
