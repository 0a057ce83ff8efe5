"""Requests for log-probabilities of their prompts: one engine alone serves them, and each row comes once."""

from __future__ import annotations

import pytest
import structlog

from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.request.prompt_logprobs import PromptLogprob, PromptLogprobs, packed
from tests.support.router.router_world import World, eventually, expected_output, in_loop, router_world
from tests.support.router.scripted_engine import ScriptedEngine

PROMPT = list(range(50))


def rows(begin: int, end: int) -> PromptLogprobs:
    return packed(begin, 0, [PromptLogprob(-float(position), 1, ()) for position in range(begin, end)])


def tell(engine: ScriptedEngine, request_id: str, begin: int, end: int, tokens: int = 0) -> None:
    engine.emit(wire.Delta(request_id, 0, expected_output(tokens), prompt=rows(begin, end)))


async def eventually_has(world: World, request_id: str, count: int) -> None:
    answer = world.gateway.answers[request_id]
    await eventually(lambda: answer.rows is not None and len(answer.rows) == count, f"{count} rows")


@pytest.mark.parametrize("strategy", ["balanced", "disaggregated", "thirds", "migrate", "auto"])
@in_loop
async def test_whatever_the_strategy_one_engine_alone_serves_it_and_that_is_said(strategy: str) -> None:
    async with router_world("a", "b", "c") as world:
        with structlog.testing.capture_logs() as logs:
            answer = await world.gateway.generate(PROMPT, strategy=strategy, prompt_logprobs=0)
        [line] = [line for line in logs if line["event"] == "request.finished"]

        [(_, call)] = world.calls()
        assert call == "StartGenerate" and answer.token_ids == expected_output(4)
        assert (line["strategy"], line["alone"]) == (strategy, "prompt_logprobs")
        assert answer.result.alone == "prompt_logprobs"
        plain = await world.gateway.generate(PROMPT, strategy=strategy)
        assert plain.result.alone == ""


@pytest.mark.parametrize("num_tokens", [0, 1])
@in_loop
async def test_each_row_comes_once_whichever_engine_tells_it(num_tokens: int) -> None:
    """The first engine dies among the rows, or behind the first token."""
    async with router_world("a", "b") as world:
        a, b = world.engines["a"], world.engines["b"]
        a.manual = b.manual = True
        answer = world.gateway.start(PROMPT, prompt_logprobs=0)
        await eventually(lambda: a.of(wire.StartGenerate) or b.of(wire.StartGenerate))
        first, second = (a, b) if a.of(wire.StartGenerate) else (b, a)
        tell(first, answer.request_id, 1, 10)
        await eventually_has(world, answer.request_id, 9)
        tell(first, answer.request_id, 10, 50 if num_tokens else 20, num_tokens)
        await eventually_has(world, answer.request_id, 49 if num_tokens else 19)
        first.die()
        again = await second.saw(wire.StartGenerate)
        assert again.num_output_tokens == num_tokens
        if not num_tokens:
            tell(second, answer.request_id, 1, 15)
            tell(second, answer.request_id, 15, 50)
        second.emit(wire.Delta(answer.request_id, num_tokens, expected_output(4)[num_tokens:]))
        second.finish(answer.request_id, 4)
        await answer.wait()

        assert answer.rows == rows(1, 50) and answer.token_ids == expected_output(4)
        await eventually(b.is_clean, "b holds nothing")


@in_loop
async def test_rows_are_of_one_model_as_tokens_are() -> None:
    async with router_world() as world:
        a = world.add_engine("a", revision="old")
        await world.list_engines()
        a.manual = True
        answer = world.gateway.start(PROMPT, prompt_logprobs=0)
        await a.saw(wire.StartGenerate)
        tell(a, answer.request_id, 1, 10)
        await eventually_has(world, answer.request_id, 9)
        b = world.add_engine("b", revision="new")
        a.die()
        await world.list_engines(b)
        ended = await answer.wait()

        assert (ended.reason, ended.code) == ("error", "engine_lost") and not b.of(wire.StartGenerate)


@pytest.mark.parametrize(
    "torn",
    [rows(12, 14), PromptLogprobs(10, 0, b"torn"), PromptLogprobs(10, -1, b"")],
    ids=["a gap", "torn", "no width"],
)
@in_loop
async def test_an_engine_that_tells_rows_wrongly_is_asked_anew(torn: PromptLogprobs) -> None:
    async with router_world("a") as world:
        a = world.engines["a"]
        a.manual = True
        answer = world.gateway.start(PROMPT, prompt_logprobs=0)
        await a.saw(wire.StartGenerate)
        tell(a, answer.request_id, 1, 10)
        await eventually_has(world, answer.request_id, 9)
        a.manual = False
        a.emit(wire.Delta(answer.request_id, 0, [], prompt=torn))
        await answer.wait()

        assert len(a.of(wire.StartGenerate)) > 1


@in_loop
async def test_a_prompt_alone_ends_without_a_token() -> None:
    async with router_world("a") as world:
        a = world.engines["a"]
        a.manual = True
        answer = world.gateway.start(PROMPT, prompt_logprobs=0, max_tokens=0)
        await a.saw(wire.StartGenerate)
        tell(a, answer.request_id, 1, 50)
        a.finish(answer.request_id, 0)
        await answer.wait()

        assert (answer.reason, answer.token_ids, answer.rows) == ("length", [], rows(1, 50))
        assert answer.numerics


@pytest.mark.parametrize(("said", "code"), [("old", "engine_lost"), ("new", "")])
@in_loop
async def test_rows_that_another_router_has_brought(said: str, code: str) -> None:
    """They come again from the first, of the model that made them or not at all."""
    async with router_world() as world:
        a = world.add_engine("a", revision="new")
        await world.list_engines()
        a.manual = True
        answer = world.gateway.start(PROMPT, prompt_logprobs=0, max_tokens=0, revision=said)
        if not code:
            await a.saw(wire.StartGenerate)
            tell(a, answer.request_id, 1, 50)
            a.finish(answer.request_id, 0)
        ended = await answer.wait()

        assert ended.code == code and answer.rows == (None if code else rows(1, 50))
