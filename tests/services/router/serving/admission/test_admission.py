"""What is served at all: bounds, limits, ids, and what a refusal says."""

from __future__ import annotations

import math
from typing import Any

import pytest

from microserve.protocol.messages import engine as wire
from microserve.protocol.messages import router as serving
from microserve.protocol.messages.request.sampling import SamplingParams
from tests.support.bus.gateway_peer import Answer
from tests.support.router.router_world import eventually, in_loop, router_world
from tests.support.router.scripted_engine import MAX_MODEL_LEN, VOCAB_SIZE

PROMPT = list(range(50))


@pytest.mark.parametrize(
    ("prompt", "fields", "code", "field"),
    [
        ([], {}, "invalid_request", "tokens"),
        ([1, VOCAB_SIZE], {}, "invalid_request", "tokens"),
        ([1] * (MAX_MODEL_LEN - 3), {"max_tokens": 4}, "prompt_too_long", "tokens"),
        ([1], {"temperature": -1.0}, "invalid_request", "temperature"),
        ([1], {"max_tokens": -1}, "invalid_request", "max_tokens"),
        ([1], {"stop_token_ids": (VOCAB_SIZE,)}, "invalid_request", "stop_token_ids"),
        ([1], {"strategy": "fastest"}, "strategy_not_found", "strategy"),
        ([1], {"model": "another"}, "model_not_found", "model"),
        ([1], {"ttl_s": math.nan}, "invalid_request", "ttl_s"),
        ([1], {"ttl_s": 0.0}, "deadline_exceeded", "ttl_s"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_served_is_refused_before_any_engine_hears_of_it(
    prompt: list[int], fields: dict[str, Any], code: str, field: str
) -> None:
    @in_loop
    async def main() -> None:
        async with router_world("d") as world:
            ended = (await world.gateway.generate(prompt, **fields)).result
            assert (ended.reason, ended.code, ended.field) == ("error", code, field)
            assert ended.detail
            assert ended.engines == []
            assert world.calls() == []

    main()


@in_loop
async def test_the_longest_prompt_that_fits() -> None:
    async with router_world("d") as world:
        answer = await world.gateway.generate([1] * (MAX_MODEL_LEN - 4), max_tokens=4, model="scripted")
        assert answer.result.reason == "length"


@in_loop
async def test_a_cut_token_frame_ends_its_request() -> None:
    async with router_world("d") as world:
        answer = Answer("cut")
        world.gateway.answers["cut"] = answer
        message = serving.Generate("cut", "", SamplingParams(), 5.0)
        world.gateway.send(message, b"\0\0\0")
        ended = await answer.wait()
        assert (ended.code, ended.field) == ("invalid_request", "tokens")


@in_loop
async def test_no_engine_is_said_at_once_with_a_hint() -> None:
    async with router_world() as world:
        ended = (await world.gateway.generate(PROMPT)).result
        assert (ended.code, ended.retry_after_s) == ("no_engines", 1.0)
        world.add_engine("d")
        await world.list_engines()
        assert (await world.gateway.generate(PROMPT)).result.reason == "length"
        world.engines["d"].load = wire.EngineLoad(draining=True)
        await eventually(lambda: not world.router.registry.usable(), "heartbeat")
        assert (await world.gateway.generate(PROMPT)).result.code == "no_engines"


@in_loop
async def test_a_live_id_cannot_be_used_twice() -> None:
    async with router_world("d") as world:
        d = world.engines["d"]
        d.paused.add("decode")
        other = world.connect_gateway()
        await eventually(lambda: other.welcomes, "welcome")
        answer = world.gateway.start(PROMPT, request_id="same")
        await d.saw(wire.StartGenerate)
        second = await other.generate(PROMPT, request_id="same")
        assert (second.result.code, second.result.field) == ("invalid_request", "request_id")
        other.cancel(second)  # not its owner
        d.resume("decode")
        assert (await answer.wait()).reason == "length"
        assert (await other.generate(PROMPT, request_id="same")).result.reason == "length"


@in_loop
async def test_more_than_max_requests_are_refused_with_a_hint() -> None:
    async with router_world("d", max_requests=2) as world:
        d = world.engines["d"]
        d.paused.add("decode")
        live = [world.gateway.start(PROMPT) for _ in range(2)]
        await d.saw(wire.StartGenerate, 2)
        ended = (await world.gateway.generate(PROMPT)).result
        assert (ended.code, ended.retry_after_s) == ("queue_full", 1.0)
        d.resume("decode")
        for answer in live:
            assert (await answer.wait()).reason == "length"
        assert (await world.gateway.generate(PROMPT)).result.reason == "length"
