"""Requests that another router served before this one: they go on behind the output that the client has."""

from __future__ import annotations

import pytest

from microserve.protocol.bus.codec import encode_tokens
from microserve.protocol.errors import EngineLost
from microserve.protocol.messages import engine as wire
from microserve.protocol.messages import router as serving
from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.services.router.strategies import BUILT_IN
from tests.support.router.router_world import expected_output, in_loop, router_world

PROMPT = list(range(50))


@pytest.mark.parametrize("strategy", [strategy.name for strategy in BUILT_IN])
def test_the_stream_goes_on_behind_what_the_client_has(strategy: str) -> None:
    @in_loop
    async def main() -> None:
        async with router_world("a", "b") as world:
            have = expected_output(2)
            answer = await world.gateway.generate(PROMPT, max_tokens=6, strategy=strategy, output=have)
            assert answer.token_ids == expected_output(6)
            assert answer.result.usage.prompt_tokens == len(PROMPT)
            assert answer.result.usage.output_tokens == 6
            await world.check_clean()

    main()


@in_loop
async def test_an_engine_that_fails_under_it_is_no_different() -> None:
    async with router_world("a", "b") as world:
        for engine in world.engines.values():
            engine.failures[wire.StartGenerate] = EngineLost("lost")
        answer = world.gateway.start(PROMPT, max_tokens=6, output=expected_output(3))
        await world.engines["a"].saw(wire.StartGenerate)
        for engine in world.engines.values():
            engine.failures.clear()
        assert (await answer.wait()).reason == "length"
        assert answer.token_ids == expected_output(6)
        await world.check_clean()


@in_loop
async def test_of_a_whole_answer_only_the_end_is_told() -> None:
    async with router_world("a") as world:
        answer = await world.gateway.generate(PROMPT, max_tokens=4, output=expected_output(4))
        assert answer.token_ids == expected_output(4)
        assert answer.result.reason == "length"
        stop = expected_output(2)[-1]
        answer = await world.gateway.generate(
            PROMPT, max_tokens=4, output=expected_output(2), stop_token_ids=(stop,)
        )
        assert (answer.result.reason, answer.result.stop_token_id) == ("stop", stop)
        assert not world.engines["a"].calls, "no engine was asked"
        await world.check_clean()


@pytest.mark.parametrize("count", [-1, 5, 54, 10_000])
def test_an_output_that_cannot_be_is_refused_by_name(count: int) -> None:
    """More than max_tokens, or no prompt left."""

    @in_loop
    async def main() -> None:
        async with router_world("a") as world:
            gateway = world.gateway
            answer = gateway.start(PROMPT, max_tokens=4, request_id="other")
            assert (await answer.wait()).reason == "length"
            refused = gateway.expect("bad", max(0, count))
            message = serving.Generate("bad", "", SamplingParams(max_tokens=4), 9.0, num_output_tokens=count)
            gateway.send(message, encode_tokens([*PROMPT, *expected_output(4)]))
            ended = await refused.wait()
            assert (ended.code, ended.field) == ("invalid_request", "num_output_tokens")

    main()
