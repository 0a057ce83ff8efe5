"""Refusal by predicted time to the first token: at once, with a hint, nothing taken; and open again soon."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from microserve.protocol.errors import QueueFull
from microserve.protocol.messages import engine as wire
from microserve.services.router.engines import prediction
from microserve.services.router.serving.admission import MAX_RETRY_S
from tests.support.bus.gateway_peer import GatewayPeer
from tests.support.router.router_world import World, eventually, in_loop, router_world

PROMPT = list(range(100))
BUSY = wire.EngineLoad(
    num_running=4,
    num_waiting=40,
    queued_prefill_tokens=50_000,
    free_blocks=900,
    prefill_tokens_per_s=10_000.0,
)
IDLE = msgspec.structs.replace(BUSY, num_running=0, num_waiting=0, queued_prefill_tokens=0)


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that stands still for seconds, what was said does not grow old in the middle of a test."""
    monkeypatch.setattr(prediction, "REPORT_MAX_AGE_S", 60.0)
    monkeypatch.setattr(prediction, "RATE_MAX_AGE_S", 60.0)


async def report(world: World, **loads: wire.EngineLoad) -> None:
    """Let the engines say so, and wait until the router has heard it."""
    for engine_id, load in loads.items():
        world.engines[engine_id].load = load
    for connection in world.router.registry.joined():
        if connection.engine_id in loads:
            await eventually(
                lambda c=connection: c.load == loads[c.engine_id],  # type: ignore[misc]
                f"{connection.engine_id} was heard",
            )


@in_loop
async def test_what_comes_too_late_for_the_operators_bound_is_refused_at_once() -> None:
    async with router_world("a", "b", max_ttft_s=2.0) as world:
        await report(world, a=BUSY, b=BUSY)
        ended = (await world.gateway.generate(PROMPT)).result
        assert (ended.reason, ended.code) == ("error", "queue_full")
        assert ended.detail == "the first token is predicted in 5.0 s, router.max_ttft_s is 2.0 s"
        assert 2.9 < ended.retry_after_s < 3.1
        assert (ended.engines, world.calls()) == ([], [])
        assert world.router.serving.book.is_zero


@in_loop
async def test_one_engine_that_is_soon_enough_is_enough() -> None:
    async with router_world("a", "b", max_ttft_s=2.0) as world:
        await report(world, a=BUSY, b=IDLE)
        assert (await world.gateway.generate(PROMPT)).result.reason == "length"
        assert world.calls() == [("b", "StartGenerate")]


@in_loop
async def test_the_requests_own_time_is_a_bound_too() -> None:
    async with router_world("a") as world:
        await report(world, a=BUSY)
        ended = (await world.gateway.generate(PROMPT, ttl_s=3.0)).result
        assert (ended.code, ended.engines) == ("queue_full", [])
        assert "the request allows 3.0 s" in ended.detail
        assert (await world.gateway.generate(PROMPT, ttl_s=20.0)).result.reason == "length"


@in_loop
async def test_a_hint_is_bounded() -> None:
    async with router_world("a", max_ttft_s=0.1) as world:
        await report(world, a=msgspec.structs.replace(BUSY, queued_prefill_tokens=10**9))
        assert (await world.gateway.generate(PROMPT)).result.retry_after_s == MAX_RETRY_S


@in_loop
async def test_engines_that_have_measured_nothing_refuse_nothing() -> None:
    async with router_world("a", max_ttft_s=0.001) as world:
        await report(world, a=msgspec.structs.replace(BUSY, prefill_tokens_per_s=0.0))
        assert (await world.gateway.generate(PROMPT)).result.reason == "length"


@in_loop
async def test_an_engine_for_decoding_that_never_prefills_does_not_open_admission() -> None:
    labels = {"p": ["prefill"], "d": ["decode"]}
    async with router_world("p", "d", labels=labels, max_ttft_s=2.0) as world:
        await report(world, p=BUSY, d=msgspec.structs.replace(IDLE, prefill_tokens_per_s=0.0))
        assert (await world.gateway.generate(PROMPT)).result.code == "queue_full"
        await report(world, d=IDLE)
        assert (await world.gateway.generate(PROMPT)).result.reason == "length"


@in_loop
async def test_what_is_cached_need_not_be_computed() -> None:
    prompt = [7, *range(3000)]
    async with router_world("a", max_ttft_s=0.2) as world:
        await report(world, a=msgspec.structs.replace(IDLE, prefill_tokens_per_s=1000.0))
        assert (await world.gateway.generate([t % 1000 for t in prompt])).result.code == "queue_full"
        world.engines["a"].store([t % 1000 for t in prompt])
        index = world.router.prefixes.index
        assert index is not None
        await eventually(lambda: index.lookup([t % 1000 for t in prompt], ""), "indexed")
        assert (await world.gateway.generate([t % 1000 for t in prompt])).result.reason == "length"


@in_loop
async def test_admission_opens_when_the_load_has_fallen() -> None:
    async with router_world("a", max_ttft_s=2.0) as world:
        await report(world, a=BUSY)
        assert (await world.gateway.generate(PROMPT)).result.code == "queue_full"
        await report(world, a=IDLE)
        assert (await world.gateway.generate(PROMPT)).result.reason == "length"


@in_loop
async def test_admission_opens_when_a_busy_report_is_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine lives (it answers), and its heartbeats are lost: what it said last counts no longer."""
    async with router_world("a", max_ttft_s=2.0) as world:
        await report(world, a=BUSY)
        world.engines["a"].mute_heartbeats = True
        assert (await world.gateway.generate(PROMPT)).result.code == "queue_full"
        monkeypatch.setattr(prediction, "REPORT_MAX_AGE_S", 0.3)
        monkeypatch.setattr(prediction, "RATE_MAX_AGE_S", 0.3)
        async with asyncio.timeout(30):
            while (await world.gateway.generate(PROMPT)).result.code == "queue_full":
                await asyncio.sleep(0.05)


async def burst(gateway: GatewayPeer, prompts: list[list[int]]) -> list[str]:
    answers = [gateway.start(prompt, max_tokens=1) for prompt in prompts]
    return [(await answer.wait()).code for answer in answers]


@in_loop
async def test_a_burst_does_not_slip_in_between_two_reports() -> None:
    """Each of them alone would be soon enough; what was admitted a moment ago counts for the next."""
    async with router_world("a", max_ttft_s=1.0) as world:
        slow = msgspec.structs.replace(IDLE, prefill_tokens_per_s=1000.0)
        await report(world, a=slow)
        world.engines["a"].paused.add("decode")
        live = [world.gateway.start([number] * 300) for number in range(10)]
        refused = live[3:]
        for answer in refused:
            assert (await answer.wait()).code == "queue_full"
        assert [answer.ended for answer in live[:3]] == [None] * 3
        world.engines["a"].resume("decode")
        for answer in live[:3]:
            assert (await answer.wait()).reason == "length"


@in_loop
async def test_the_choices_of_one_prompt_count_its_prefill_once() -> None:
    async with router_world("a", max_ttft_s=1.0) as world:
        await report(world, a=msgspec.structs.replace(IDLE, prefill_tokens_per_s=1000.0))
        assert await burst(world.gateway, [[5] * 800] * 8) == [""] * 8


@in_loop
async def test_a_running_request_is_never_refused_by_it() -> None:
    """Its engine is lost while the other one has far too much to do: it goes on there all the same."""
    async with router_world("a", "b", max_ttft_s=2.0) as world:
        a, b = world.engines["a"], world.engines["b"]
        a.manual = True
        await report(world, a=IDLE, b=BUSY)
        answer = world.gateway.start(PROMPT, max_tokens=4, strategy="data_parallel")
        await a.saw(wire.StartGenerate)
        await report(world, b=msgspec.structs.replace(BUSY, num_waiting=500, queued_prefill_tokens=10**6))
        a.die()
        ended = await answer.wait()
        assert (ended.reason, ended.engines) == ("length", ["a", "b"])
        await b.saw(wire.StartGenerate)


@in_loop
async def test_when_every_engine_is_full_the_request_is_refused_and_not_kept() -> None:
    """With an hour's patience for calls, a refusal must still come at once."""
    async with router_world("a", "b", call_timeout_s=3600.0) as world:
        for engine in world.engines.values():
            engine.failures[wire.StartGenerate] = QueueFull("512 requests wait already", retry_after_s=1.0)
        for strategy in ("auto", "data_parallel", "disaggregated"):
            ended = (await world.gateway.generate(PROMPT, strategy=strategy)).result
            assert (ended.code, ended.retry_after_s) == ("queue_full", 1.0)
