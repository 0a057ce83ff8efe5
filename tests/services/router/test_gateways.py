"""The door for gateways: credit, one message a wake-up, liveness, and frames that no gateway sends."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable

import pytest
import structlog
from hypothesis import given, settings
from hypothesis import strategies as st

from microserve.protocol import log
from microserve.protocol.bus.codec import ROUTER_REPLY, ROUTER_REQUEST, Channel, encode_tokens
from microserve.protocol.bus.numbered import NumberedClient
from microserve.protocol.bus.transport import (
    PeerHandler,
)
from microserve.protocol.messages import engine as wire
from microserve.protocol.messages import router as serving
from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.protocol.process.lifecycle import Lifecycle
from microserve.protocol.types import WIRE_VERSION
from microserve.services.router.service import Router
from tests.support.bus.direct_bus import DirectBus
from tests.support.bus.gateway_peer import Answer
from tests.support.bus.junk import junk
from tests.support.bus.lossy_bus import LossyBus
from tests.support.examples import examples
from tests.support.router.router_world import (
    World,
    eventually,
    expected_output,
    in_loop,
    make_settings,
    router_world,
)

PROMPT = list(range(50))


@in_loop
async def test_welcome_and_heartbeats_tell_what_the_mesh_is() -> None:
    async with router_world() as world:
        first = world.gateway.welcomes[0]
        assert (first.model, first.num_engines, first.max_model_len, first.vocab_size) == ("", 0, 0, 0)
        assert first.strategies == world.router.strategies.names
        assert first.default_strategy == "auto"
        a = world.add_engine("a", num_blocks=100)
        a.load = wire.EngineLoad(num_running=3, num_waiting=1, free_blocks=40)
        b = world.add_engine("b", max_model_len=1000, num_blocks=300)
        b.load = wire.EngineLoad(num_running=2, free_blocks=300)
        await world.list_engines()
        await eventually(lambda: [b for b in world.gateway.heartbeats if b.num_running == 5], "told")
        beat = world.gateway.heartbeats[-1]
        assert (beat.num_engines, beat.num_waiting, beat.kv_usage) == (2, 1, 60 / 400)
        assert (beat.model, beat.max_model_len, beat.vocab_size) == ("scripted", 1000, 1000)
        assert (beat.num_requests, beat.max_requests) == (0, 1024)
        assert beat.incarnation == first.incarnation == world.router.identity.incarnation
        world.gateway.hello()
        await eventually(lambda: len(world.gateway.welcomes) == 2, "welcome again")
        assert world.gateway.welcomes[1].num_engines == 2


@in_loop
async def test_one_stream_message_carries_all_requests_of_a_wake_up() -> None:
    async with router_world("d") as world:
        d = world.engines["d"]
        d.manual = True
        answers = [world.gateway.start(PROMPT) for _ in range(20)]
        await d.saw(wire.StartGenerate, 20)
        for step in range(5):
            d.emit(*(wire.Delta(answer.request_id, step, [step]) for answer in answers))
            for answer in answers:
                await answer.tokens(step + 1)
        assert [len(stream.outputs) for stream in world.gateway.streams] == [20] * 5
        for answer in answers:
            d.finish(answer.request_id, 5)
            await answer.wait()


@in_loop
async def test_without_credit_outputs_merge_and_nothing_is_lost() -> None:
    async with router_world("d") as world:
        d = world.engines["d"]
        d.manual = True
        slow = world.connect_gateway(credit=1, auto_credit=False)
        await eventually(lambda: slow.welcomes, "welcome")
        first, second = slow.start(PROMPT, max_tokens=60), slow.start(PROMPT, max_tokens=60)
        await d.saw(wire.StartGenerate, 2)
        for position in range(30):
            d.emit(*(wire.Delta(a.request_id, position, [position]) for a in (first, second)))
            if position == 0:
                await first.tokens(1)  # that was its one message
        d.finish(first.request_id, 30)
        # Another gateway is not held up by the one that takes nothing.
        brisk = world.gateway.start(PROMPT)
        await d.saw(wire.StartGenerate, 3)
        d.emit(wire.Delta(brisk.request_id, 0, [1]))
        d.finish(brisk.request_id, 1)
        await brisk.wait()
        assert len(slow.streams) == 1
        slow.send(serving.StreamCredit(1))
        await first.wait()
        assert len(slow.streams) == 2
        assert first.token_ids == second.token_ids == list(range(30))
        slow.send(serving.StreamCredit(10))
        d.finish(second.request_id, 30)
        await second.wait()


@in_loop
async def test_a_hello_of_the_same_life_keeps_its_requests_and_opens_the_window_again() -> None:
    async with router_world("d") as world:
        world.engines["d"].paused.add("decode")
        slow = world.connect_gateway(credit=1, auto_credit=False)
        await eventually(lambda: slow.welcomes, "welcome")
        answers = [slow.start(PROMPT), slow.start(PROMPT)]
        await world.engines["d"].saw(wire.StartGenerate, 2)
        slow.auto_credit = True
        slow.hello()
        world.engines["d"].resume("decode")
        for answer in answers:
            assert (await answer.wait()).reason == "length"


@pytest.mark.slow
@in_loop
async def test_a_silent_gateway_loses_its_requests_and_only_those() -> None:
    async with router_world("d", liveness=20) as world:
        d = world.engines["d"]
        d.paused.add("decode")
        lost = world.connect_gateway()
        await eventually(lambda: lost.welcomes, "welcome")
        lost.start(PROMPT)
        kept = world.gateway.start(PROMPT)
        await d.saw(wire.StartGenerate, 2)
        with structlog.testing.capture_logs() as logs:
            lost.fall_silent()
            await d.saw(wire.Abort)
        events = [e for e in logs if e["event"] == log.GATEWAY_LOST]
        assert [(e["gateway_id"], e["reason"], e["requests"]) for e in events] == [
            (lost.gateway_id, "silent", 1)
        ]
        d.resume("decode")
        assert (await kept.wait()).reason == "length"
        # It may come back.
        lost.hello()
        await eventually(lambda: len(lost.welcomes) == 2, "welcome again")


@in_loop
async def test_a_gateway_that_is_gone_is_noticed_by_sending() -> None:
    async with router_world("d") as world:
        d = world.engines["d"]
        d.paused.add("decode")
        gone = world.connect_gateway()
        await eventually(lambda: gone.welcomes, "welcome")
        gone.start(PROMPT)
        await d.saw(wire.StartGenerate)
        gone.close()
        await d.saw(wire.Abort)
        await eventually(lambda: len(world.router.gateways) == 1, "lost")


@in_loop
async def test_a_new_life_of_a_gateway_ends_the_requests_of_the_old_one() -> None:
    async with router_world("d") as world:
        d = world.engines["d"]
        d.paused.add("decode")
        old = world.connect_gateway(incarnation=1)
        await eventually(lambda: old.welcomes, "welcome")
        old.start(PROMPT)
        await d.saw(wire.StartGenerate)
        young = world.connect_gateway(incarnation=2)
        young.gateway_id = old.gateway_id
        young.hello()
        await d.saw(wire.Abort)
        d.resume("decode")
        assert (await young.generate(PROMPT)).token_ids == expected_output(4)


@in_loop
async def test_a_new_connection_of_a_gateway_ends_the_requests_of_the_old_one() -> None:
    async with router_world("d") as world:
        d = world.engines["d"]
        d.paused.add("decode")
        old = world.connect_gateway()
        await eventually(lambda: old.welcomes, "welcome")
        old.start(PROMPT)
        await d.saw(wire.StartGenerate)
        new = world.connect_gateway()
        new.gateway_id = old.gateway_id
        new.hello()
        await d.saw(wire.Abort)
        d.resume("decode")
        assert (await new.generate(PROMPT)).token_ids == expected_output(4)
        await eventually(lambda: old.failures, "the old connection is refused")


@in_loop
async def test_a_gateway_whose_messages_were_lost_loses_its_requests_and_is_told_so() -> None:
    async with router_world("d") as world:
        d = world.engines["d"]
        d.paused.add("decode")
        lossy = LossyBus(world.bus)
        replies: list[serving.RouterReply] = []
        losses: list[str] = []
        gateway = NumberedClient(
            lossy,
            world.router.address,
            lambda frames: replies.append(ROUTER_REPLY.decode(frames)[0]),
            losses.append,
        )

        def send(message: serving.RouterRequest, *bulk: bytes) -> None:
            gateway.send(ROUTER_REQUEST.encode(message, *bulk))

        send(serving.GatewayHello("g", 1, 8))
        send(serving.Generate("r", "", SamplingParams(), 30.0), encode_tokens(PROMPT))
        await d.saw(wire.StartGenerate)
        lossy.lose_next_up()
        send(serving.StreamCredit(1))
        send(serving.GatewayPing(1))
        await d.saw(wire.Abort)
        await eventually(lambda: any(isinstance(r, serving.RouterFailed) for r in replies), "told so")
        send(serving.GatewayHello("g", 1, 8))
        await eventually(lambda: sum(isinstance(r, serving.RouterWelcome) for r in replies) == 2, "welcome")
        assert not losses
        gateway.close()


@in_loop
async def test_who_has_not_said_hello_is_told_so() -> None:
    async with router_world("d", liveness=20) as world:
        stranger = world.connect_gateway()
        await eventually(lambda: stranger.welcomes, "welcome")
        stranger.fall_silent()
        await eventually(lambda: len(stranger.failures) == 1, "told so at once")
        assert len(world.router.gateways) == 1
        stranger.start(PROMPT)
        stranger.send(serving.GatewayPing(1))
        await eventually(lambda: len(stranger.failures) == 3, "answers")
        assert {failure.code for failure in stranger.failures} == {"protocol_violation"}
        assert all("GatewayHello first" in failure.detail for failure in stranger.failures)
        assert len(world.router.serving) == 0


@in_loop
async def test_messages_against_the_contract_are_answered_counted_and_change_nothing() -> None:
    async with router_world("d") as world:
        peer = world.gateway
        params = SamplingParams()
        bad: list[tuple[serving.RouterRequest, tuple[bytes, ...]]] = [
            (serving.Generate("x", "", params, 5.0), ()),
            (serving.Generate("x", "", params, 5.0), (b"", b"")),
            (serving.Generate("x" * 129, "", params, 5.0), (b"\1\0\0\0",)),
            (serving.Generate("", "", params, 5.0), (b"\1\0\0\0",)),
            (serving.Cancel("x"), (b"bulk",)),
            (serving.GatewayPing(99), ()),
            (serving.GatewayHello("", 1, 5), ()),
        ]
        with structlog.testing.capture_logs() as logs:
            for message, bulk in bad:
                peer.send(message, *bulk)
            peer.send_frames([bytes((WIRE_VERSION + 1, Channel.GATEWAY_TO_ROUTER)), b"\x91\1"])
            peer.send_frames([b"?"])
            await eventually(lambda: len(peer.failures) == len(bad) + 2, "answers")
        assert world.router.gateways.num_rejected == len(bad) + 2
        assert len([e for e in logs if e["event"] == log.FRAME_REJECTED]) == 1  # once a second at most
        assert (await peer.generate(PROMPT)).result.reason == "length"


SAMPLES: list[serving.RouterRequest] = [
    serving.GatewayHello("g", 1, 8),
    serving.Generate("r", "", SamplingParams(seed=3, logprobs=2, stop_token_ids=(1, 2)), 5.0, "auto", "salt"),
    serving.Cancel("r"),
    serving.GatewayPing(1),
    serving.StreamCredit(3),
]


def with_handler(run: Callable[[PeerHandler, DirectBus, Router], None]) -> None:
    """Call ``run`` in a loop with the handler of a router that has no engines."""

    async def main() -> None:
        bus = DirectBus()
        router = Router(make_settings("tcp://127.0.0.1:1"), bus, seed=1)
        running = asyncio.create_task(router.run(Lifecycle()))
        await asyncio.sleep(0)
        server = bus.servers[0]
        run(server.receive, bus, router)
        await asyncio.sleep(0)
        assert router.serving.book.is_zero
        running.cancel()
        await asyncio.wait([running])
        assert running.cancelled()
        for peer, frames in server.sent:
            assert peer
            # Junk may look like a number; answers to its sender are numbered then.
            ROUTER_REPLY.decode([frames[0][:2], *frames[1:]])

    asyncio.run(main())


@pytest.mark.slow
def test_a_hundred_thousand_junk_messages_are_answered_or_dropped() -> None:
    header = bytes((WIRE_VERSION, Channel.GATEWAY_TO_ROUTER))
    samples = [ROUTER_REQUEST.encode(message)[1] for message in SAMPLES]

    def run(handler: PeerHandler, bus: DirectBus, router: Router) -> None:
        with structlog.testing.capture_logs() as logs:
            for number, frames in enumerate(junk(7, header, samples, 100_000)):
                handler(b"peer%d" % (number % 50), frames)
        assert router.gateways.num_rejected > 50_000
        assert len([e for e in logs if e["event"] == log.FRAME_REJECTED]) < 200
        assert not [e for e in logs if e["event"] == log.BUS_HANDLER_FAILED]

    with_handler(run)


@settings(max_examples=examples(50), deadline=None)
@given(st.lists(st.lists(st.binary(max_size=40), max_size=6), max_size=50), st.randoms())
def test_random_frames_never_raise(messages: list[list[bytes]], rng: random.Random) -> None:
    def run(handler: PeerHandler, bus: DirectBus, router: Router) -> None:
        for frames in messages:
            handler(b"peer", frames)
            sample = ROUTER_REQUEST.encode(rng.choice(SAMPLES))
            handler(b"peer", [*sample, *frames[:2]])

    with structlog.testing.capture_logs():
        with_handler(run)


@in_loop
async def test_junk_on_the_socket_disturbs_nobody() -> None:
    async with router_world("d") as world:
        await _flood(world)
        assert (await world.gateway.generate(PROMPT)).token_ids == expected_output(4)


async def _flood(world: World) -> None:
    rng = random.Random(3)
    attacker = world.connect_gateway()
    await eventually(lambda: attacker.welcomes, "welcome")
    attacker.answers["r"] = Answer("r")
    for _ in range(2000):
        count = rng.randrange(1, 7)
        attacker.send_frames([os.urandom(rng.randrange(50)) for _ in range(count)])
    await eventually(lambda: world.router.gateways.num_rejected >= 2000, "rejected")
    attacker.hello()  # a random header may have passed for a number, and so for a loss
    attacker.send(SAMPLES[1], encode_tokens(PROMPT))
    await eventually(lambda: attacker.answers["r"].ended is not None, "served all the same")
