"""Where there is no room: another engine, or another way, before the request is refused."""

from __future__ import annotations

from microserve.protocol.errors import PromptTooLong, QueueFull
from microserve.protocol.messages import engine as wire
from tests.support.router.router_world import expected_output, in_loop, router_world

PROMPT = list(range(50))
LABELS = {"d": ["decode"], "p": ["prefill"]}


@in_loop
async def test_where_one_engine_is_full_another_serves() -> None:
    async with router_world("d", "p", labels=LABELS) as world:
        world.engines["d"].failures[wire.StartGenerate] = QueueFull("full", retry_after_s=1.5)
        answer = await world.gateway.generate(PROMPT, strategy="disaggregated")
        assert answer.token_ids == expected_output(4)
        assert answer.result.engines[-1] == "p"
        await world.check_clean()


@in_loop
async def test_what_is_too_long_to_be_received_is_served_where_it_is_computed() -> None:
    async with router_world("d", "p", labels=LABELS) as world:
        for engine in world.engines.values():
            engine.failures[wire.PrepRecv] = PromptTooLong("at most half of the pool", field="end")
        answer = await world.gateway.generate(PROMPT, strategy="disaggregated")
        assert answer.token_ids == expected_output(4)
        for engine in world.engines.values():
            engine.failures[wire.StartGenerate] = PromptTooLong("50 tokens", field="tokens")
        assert (
            await world.gateway.generate(PROMPT, strategy="disaggregated")
        ).result.code == "prompt_too_long"
        await world.check_clean()
