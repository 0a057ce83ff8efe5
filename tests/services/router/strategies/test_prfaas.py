"""Prompts between two clusters: who computes what, copies of prefixes, links that fail, and nothing leaked.

Engines in memory compute hashes in the place of a model: each answer proves that the right KV was read.
"""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from microserve.protocol.errors import TransferFailed
from microserve.protocol.messages import engine as wire
from microserve.services.router.authoring import Offload
from microserve.testing import Engine, MeshInMemory, Send, in_memory
from tests.support.router.router_world import (
    World,
    expected_output,
    in_loop,
    router_world,
)

NEAR = (
    Engine("d0", labels=["decode"], cluster="near"),
    Engine("p0", labels=["prefill"], cluster="near"),
)
FAR = (Engine("f0", labels=["prefill"], cluster="far"), Engine("f1", labels=["prefill"], cluster="far"))
AT_1000 = {"threshold": 1000, "replan": False}


@in_memory("prfaas", *NEAR, *FAR, parameters=AT_1000)
async def test_a_long_prompt_is_computed_in_the_other_cluster_and_a_short_one_is_not(
    mesh: MeshInMemory,
) -> None:
    short, long = await mesh.ask(prompt_tokens=1000), await mesh.ask(prompt_tokens=1001)
    assert short.plan.sends == [Send("p0", "d0", 0, 1000)]
    [send] = long.plan.sends
    assert (send.source, send.target) in [("f0", "d0"), ("f1", "d0")]
    assert long.plan.generated_on == "d0"
    assert long.plan.notes == [("by threshold", {"cluster": "far", "uncached": 1001, "threshold": 1000})]
    assert mesh.mistakes == []


@in_memory("prfaas", *NEAR, parameters=AT_1000)
async def test_without_another_cluster_all_is_served_at_home(mesh: MeshInMemory) -> None:
    answer = await mesh.ask(prompt_tokens=3000)
    assert answer.plan.sends == [Send("p0", "d0", 0, 3000)]


@in_memory("prfaas", Engine("a"), Engine("b"), parameters=AT_1000)
async def test_without_clusters_it_splits_as_it_can(mesh: MeshInMemory) -> None:
    assert (await mesh.ask(prompt_tokens=3000)).is_good
    assert mesh.mistakes == []


@in_memory("prfaas", Engine("h", cluster="near"), *FAR, parameters={**AT_1000, "home": "near"})
async def test_a_home_of_one_engine_computes_what_is_short_itself(mesh: MeshInMemory) -> None:
    short, long = await mesh.ask(prompt_tokens=500), await mesh.ask(prompt_tokens=2000)
    assert (short.plan.sends, short.plan.generated_on) == ([], "h")
    assert long.plan.sends[0].target == "h"


@in_memory("prfaas", *NEAR, *FAR, parameters=AT_1000)
async def test_what_is_cached_at_home_counts(mesh: MeshInMemory) -> None:
    prompt = mesh.prompt(2000)
    await mesh.warm("p0", prompt[:1600])
    answer = await mesh.ask(prompt=prompt)
    assert [send.source for send in answer.plan.sends] == ["p0"]


@in_memory("prfaas", *NEAR, *FAR, parameters=AT_1000)
async def test_a_prefix_of_the_other_cluster_is_copied_where_it_is_computed(mesh: MeshInMemory) -> None:
    """The link has room: what f1 holds spares home 1,600 tokens."""
    prompt = mesh.prompt(2000)
    await mesh.warm("f1", prompt[:1600])
    answer = await mesh.ask(prompt=prompt)
    assert answer.plan.sends == [Send("f1", "p0", 0, 1600), Send("p0", "d0", 0, 2000)]
    again = await mesh.ask(prompt=prompt)
    assert all(send.source != "f1" for send in again.plan.sends), "home has it now"


@in_memory("prfaas", *NEAR, *FAR, parameters=AT_1000)
async def test_a_prefix_of_home_is_copied_to_the_other_cluster(mesh: MeshInMemory) -> None:
    prompt = mesh.prompt(3000)
    await mesh.warm("p0", prompt[:1600])
    answer = await mesh.ask(prompt=prompt)
    first, second = answer.plan.sends
    assert (first.source, first.begin, first.end) == ("p0", 0, 1600)
    assert (second.source, second.target) == (first.target, "d0")
    assert second.source in ("f0", "f1")


@in_memory("prfaas", *NEAR, *FAR, parameters=AT_1000)
async def test_a_scarce_link_carries_no_copies_and_each_cluster_is_judged_by_its_own(
    mesh: MeshInMemory,
) -> None:
    prompt = mesh.prompt(2000)
    await mesh.warm("f1", prompt[:1600])
    assert (await mesh.ask(prompt_tokens=100)).is_good
    rule = offload_of(mesh).crossings["far"].rule
    rule.is_scarce, rule.low = True, -1.0  # for as long as this lasts
    answer = await mesh.ask(prompt=prompt)
    assert answer.plan.sends == [Send("f1", "d0", 0, 2000)], "2,000 are not cached at home"


def offload_of(mesh: MeshInMemory) -> Offload:
    found = mesh.state()["offload"]
    assert isinstance(found, Offload)
    return found


@in_memory("prfaas", *NEAR, *FAR, parameters=AT_1000)
async def test_only_what_home_lacks_goes_over_the_link(mesh: MeshInMemory) -> None:
    """In bytes, as the senders count what they put."""
    assert (await mesh.ask(prompt_tokens=2000)).is_good
    first = offload_of(mesh).crossings["far"].sent_nbytes
    assert first % 2000 == 0
    prompt = mesh.prompt(3200)
    await mesh.warm("d0", prompt[:1600])
    answer = await mesh.ask(prompt=prompt)
    [*_, send] = answer.plan.sends
    assert (send.target, send.begin, send.end) == ("d0", 1600, 3200)
    assert offload_of(mesh).crossings["far"].sent_nbytes - first == 1600 * first // 2000


# --- what fails --------------------------------------------------------------------------------------


@in_memory("prfaas", *NEAR, *FAR[:1], parameters=AT_1000)
async def test_an_engine_that_dies_in_the_middle_of_a_send_is_replaced_by_home(mesh: MeshInMemory) -> None:
    prompt = mesh.prompt(8000)
    asking = asyncio.ensure_future(mesh.ask(prompt=prompt, max_tokens=8))
    await asyncio.sleep(0.4)
    mesh.kill("f0")
    answer = await asking
    assert answer.is_good, answer.detail
    assert answer.plan.num_attempts > 1
    assert answer.plan.sends == [Send("p0", "d0", answer.plan.sends[0].begin, 8000)]


async def clusters(world: World) -> None:
    world.add_engine("d", cluster="near", labels=["decode"])
    world.add_engine("p", cluster="near", labels=["prefill"])
    world.add_engine("f", cluster="far", labels=["prefill"])
    await world.list_engines()


def senders(world: World) -> list[str]:
    return [
        engine_id
        for engine_id, engine in world.engines.items()
        for call in engine.calls
        if isinstance(call, wire.RemoteSend)
    ]


@in_loop
async def test_a_link_that_fails_in_a_transfer_has_the_prompt_computed_at_home() -> None:
    """The engine there lives, the way from it is cut: nothing else goes across for a while."""
    async with router_world() as world:
        await clusters(world)
        world.router.strategies.configure({"prfaas": {"threshold": 50, "replan": False, "period_s": 60.0}})
        world.engines["f"].failures[wire.RemoteSend] = TransferFailed("the link is down")
        answer = await world.gateway.generate(list(range(200)), strategy="prfaas")
        assert answer.token_ids == expected_output(4), answer.result
        assert senders(world) == ["f"]
        assert answer.result.engines[-1] == "p", "who says that it failed is believed, and d may be to blame"
        world.forget_calls()
        answer = await world.gateway.generate(list(range(300, 500)), strategy="prfaas")
        assert answer.token_ids == expected_output(4)
        assert senders(world) == ["p"], "the link is left alone"
        del world.engines["f"].failures[wire.RemoteSend]
        [state] = [kept.state["offload"] for kept in world.router.serving.plans._kept.values() if kept.state]
        state.crossings["far"].lost_until = 0.0
        world.forget_calls()
        await world.gateway.generate(list(range(600, 800)), strategy="prfaas")
        assert senders(world) == ["f"]


# --- what goes on for long ---------------------------------------------------------------------------


@in_memory("prfaas", *NEAR, *FAR, parameters={"threshold": 300, "period_s": 0.5, "link_gbps": 1e-6})
async def test_a_link_that_is_too_slow_raises_the_threshold(mesh: MeshInMemory) -> None:
    """A thousandth of a Mbit/s, by the operator's word."""
    await mesh.ask(prompt_tokens=400)
    rule = offload_of(mesh).crossings["far"].rule
    for _ in range(20):
        await mesh.ask(prompt_tokens=int(rule.tokens) + 100)
        if rule.is_scarce:
            break
    await asyncio.sleep(1.0)
    assert rule.tokens > 300


@in_memory("prfaas", *NEAR, *FAR, parameters={"threshold": 100_000, "period_s": 0.2, "link_gbps": 1.0})
async def test_lengths_that_came_and_rates_that_were_measured_make_another_threshold(
    mesh: MeshInMemory,
) -> None:
    """Nothing goes across at first; what a token's KV weighs is known from a prefix that was copied."""
    prompt = mesh.prompt(2000)
    await mesh.warm("f1", prompt[:1600])
    rng = random.Random(5)
    await mesh.ask(prompt=prompt)
    asking = [mesh.ask(prompt_tokens=rng.randrange(50, 1500), max_tokens=2) for _ in range(140)]
    await asyncio.gather(*asking)
    await asyncio.sleep(2.0)
    rule = offload_of(mesh).crossings["far"].rule
    assert rule.best < 2000


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "longest"),
    [(400, 600), pytest.param(10_000, 120, marks=[pytest.mark.heavy, pytest.mark.timeout(600)])],
)
def test_many_requests_leave_nothing_behind(count: int, longest: int) -> None:
    """Prompts of all lengths and shared beginnings: right tokens (asked for by ``ask``), no block kept."""
    parameters: dict[str, Any] = {"threshold": longest // 3, "period_s": 0.5}
    with MeshInMemory("prfaas", *NEAR, *FAR, parameters=parameters, num_blocks=512) as mesh:
        mesh.run(_many(mesh, count, longest, random.Random(f"prfaas {count}")))
        assert mesh.mistakes == []


async def _many(mesh: MeshInMemory, count: int, longest: int, rng: random.Random) -> None:
    beginnings = [mesh.prompt(rng.randrange(longest // 10, longest)) for _ in range(12)]
    for _ in range(0, count, 8):
        asked = []
        for _ in range(8):
            prompt = [*rng.choice(beginnings), *mesh.prompt(rng.randrange(1, longest // 2))]
            leave = rng.uniform(0.05, 0.6) if rng.random() < 0.1 else None
            asked.append(mesh.ask(prompt=prompt, max_tokens=rng.randrange(1, 6), leave_after_s=leave))
        answers = await asyncio.gather(*asked)
        assert all(answer.is_good or answer.reason == "abort" for answer in answers), answers
    await asyncio.sleep(5.0)
    assert mesh._mesh.check_integrity() == []
    for seat in mesh._seats.values():
        core = mesh._mesh.seats[seat].service.core
        core.check_integrity()
        assert core.memory.pool.num_free == core.layout.num_blocks, seat
    assert mesh._router(0).serving.book.is_zero
    assert not offload_of(mesh)._crossed
    assert not any(crossing.due for crossing in offload_of(mesh).crossings.values())
