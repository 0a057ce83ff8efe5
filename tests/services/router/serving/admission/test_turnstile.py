"""Tenants at a real router: a flood waits here, not in the engines; whatever ends a wait leaves nothing."""

from __future__ import annotations

import asyncio

from microserve.protocol.bus.codec import encode_tokens
from microserve.protocol.messages import engine as wire
from microserve.protocol.messages import router as serving
from microserve.protocol.messages.engine import EngineLoad
from microserve.protocol.messages.request.sampling import SamplingParams
from tests.support.bus.gateway_peer import Answer, GatewayPeer
from tests.support.router.router_world import (
    World,
    eventually,
    expected_output,
    in_loop,
    router_world,
)

PROMPT = list(range(40))


def start(gateway: GatewayPeer, tenant: str, *, ttl_s: float = 30.0, priority: int = 0) -> Answer:
    answer = Answer(f"{tenant}-{len(gateway.answers)}")
    gateway.answers[answer.request_id] = answer
    params = SamplingParams(max_tokens=4)
    message = serving.Generate(
        answer.request_id, "", params, ttl_s, salt=answer.request_id, tenant=tenant, priority=priority
    )
    gateway.send(message, encode_tokens(PROMPT))
    return answer


def at_engine(world: World, engine_id: str = "e") -> list[str]:
    """Requests that the engine has been asked to generate for."""
    calls = world.engines[engine_id].calls
    return [call.request_id for call in calls if isinstance(call, wire.StartGenerate)]


async def hold(world: World) -> None:
    """The engine takes requests and gives no token; it has said that it has eight places."""
    engine = world.engines["e"]
    engine.load = EngineLoad(max_num_seqs=8)
    await eventually(lambda: world.router.registry.usable()[0].load.max_num_seqs == 8, "the load is known")
    engine.manual = True


@in_loop
async def test_a_flood_waits_in_the_router_and_others_go_past_it() -> None:
    async with router_world("e") as world:
        await hold(world)
        other = [start(world.gateway, "other")]
        flood = [start(world.gateway, "flood") for _ in range(40)]
        await eventually(lambda: len(world.router.serving) == 41, "all are live")
        at_once = world.router.serving.turnstile._turns._num_running
        assert 2 <= at_once <= 8
        await eventually(lambda: len(at_engine(world)) == at_once, "they are at the engine")
        other.append(start(world.gateway, "other"))
        await eventually(lambda: other[1].request_id in at_engine(world), "it finds a place")
        assert len(at_engine(world)) == at_once + 1
        world.engines["e"].manual = False
        world.engines["e"]._advance()
        for answer in [*flood, *other]:
            assert (await answer.wait()).reason == "length"
            assert answer.token_ids == expected_output(4)


@in_loop
async def test_requests_of_nobody_in_particular_do_not_wait() -> None:
    async with router_world("e") as world:
        await hold(world)
        answers = [start(world.gateway, "") for _ in range(20)]
        await eventually(lambda: len(at_engine(world)) == 20, "as it is without keys")
        for answer in answers:
            world.gateway.cancel(answer)
            await answer.wait()


@in_loop
async def test_a_wait_that_ends_otherwise_leaves_nothing() -> None:
    async with router_world("e") as world:
        await hold(world)
        first = [start(world.gateway, "flood") for _ in range(30)]
        late = start(world.gateway, "flood", ttl_s=0.2)
        gone = start(world.gateway, "flood")
        await eventually(lambda: len(world.router.serving) == 32, "all are live")
        world.gateway.cancel(gone)
        assert (await gone.wait()).reason == "abort"
        assert (await late.wait()).code == "deadline_exceeded"
        assert {late.request_id, gone.request_id}.isdisjoint(at_engine(world))
        for answer in first:
            world.gateway.cancel(answer)
        for answer in first:
            await answer.wait()
        world.router.serving.turnstile._turns.check_integrity()
        assert world.router.serving.turnstile._waiting == {}


@in_loop
async def test_a_gateway_that_is_lost_takes_its_waiting_requests_along() -> None:
    async with router_world("e", liveness=6) as world:
        await hold(world)
        other = world.connect_gateway()
        for _ in range(20):
            start(other, "flood")
        await eventually(lambda: len(world.router.serving) == 20, "all are live")
        other.fall_silent()
        await eventually(lambda: len(world.router.serving) == 0, "none is")


@in_loop
async def test_engines_that_are_lost_hold_no_turn_back() -> None:
    async with router_world("e", check=False, call_timeout_s=0.5) as world:
        await hold(world)
        answers = [start(world.gateway, "flood", ttl_s=3.0) for _ in range(12)]
        await eventually(lambda: len(world.router.serving) == 12, "all are live")
        world.engines["e"].close()
        world.index.set([])
        for answer in answers:
            assert (await answer.wait()).reason == "error"
        assert len(world.router.serving) == 0


@in_loop
async def test_one_tenant_cannot_take_all_of_a_routers_requests() -> None:
    async with router_world("e", max_requests=18) as world:
        await hold(world)
        first = start(world.gateway, "other")
        flood = [start(world.gateway, "flood") for _ in range(60)]
        refused = [answer for answer in flood if answer.ended is not None]
        async with asyncio.timeout(30):
            while len(refused) < 43:
                await asyncio.sleep(0.01)
                refused = [answer for answer in flood if answer.ended is not None]
        assert {answer.result.code for answer in refused} == {"queue_full"}
        other = start(world.gateway, "other")
        await eventually(lambda: other.request_id in at_engine(world), "there is room for somebody else")
        for answer in [first, *flood, other]:
            if answer.ended is None:
                world.gateway.cancel(answer)
                await answer.wait()


@in_loop
async def test_a_higher_priority_goes_first() -> None:
    async with router_world("e") as world:
        await hold(world)
        start(world.gateway, "b")
        low = [start(world.gateway, "a") for _ in range(12)]
        high = start(world.gateway, "a", priority=5)
        await eventually(lambda: len(world.router.serving) == 14, "all are live")
        assert high.request_id not in at_engine(world)
        world.engines["e"].manual = False
        world.engines["e"]._advance()
        await high.wait()
        for answer in low:
            await answer.wait()
        order = at_engine(world)
        assert order.index(high.request_id) < order.index(low[-1].request_id)
