"""Requests and their ends: cancel, deadline, loss, errors and stop, in every phase of a request."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from typing import Any

import pytest
import structlog

from microserve.protocol import log
from microserve.protocol.bus.codec import encode_tokens
from microserve.protocol.errors import CacheFull, QueueFull, TransferFailed
from microserve.protocol.messages import engine as wire
from microserve.protocol.messages import router as serving
from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.services.router.strategies import BUILT_IN
from tests.support.bus.gateway_peer import Answer
from tests.support.router.router_world import (
    INTERVAL_S,
    World,
    eventually,
    expected_output,
    in_loop,
    router_world,
)
from tests.support.router.scripted_engine import ScriptedEngine

PROMPT = list(range(50))
LABELS = {"d": ["decode"], "p": ["prefill"]}

Reached = Callable[[ScriptedEngine, ScriptedEngine], bool]

PHASES: dict[str, tuple[list[str], Reached]] = {
    "granting": (["PrepRecv"], lambda d, p: bool(d.of(wire.PrepRecv))),
    "sending": (["RemoteSend"], lambda d, p: bool(p.of(wire.RemoteSend)) and bool(d.of(wire.StartGenerate))),
    "accepting": (["StartGenerate"], lambda d, p: bool(d.of(wire.StartGenerate))),
    "decoding": (["decode"], lambda d, p: bool(d.of(wire.StartGenerate))),
}
"""Phase -> what the engines hold back, and how they see that the request is there."""


async def stuck_in(world: World, phase: str, **fields: Any) -> Answer:
    """A disaggregated request that stays in ``phase``."""
    paused, reached = PHASES[phase]
    d, p = world.engines["d"], world.engines["p"]
    for engine in (d, p):
        engine.paused.update(paused)
    answer = world.gateway.start(PROMPT, strategy="disaggregated", **fields)
    await eventually(lambda: reached(d, p), f"the request is {phase}")
    if phase == "decoding":
        await answer.tokens(1)  # the sender's
    return answer


def holders(world: World) -> list[ScriptedEngine]:
    """Engines that have been asked for something that has not ended."""
    return [engine for engine in world.engines.values() if not engine.is_clean()]


@pytest.mark.parametrize("phase", PHASES)
def test_cancel_reaches_every_engine(phase: str) -> None:
    @in_loop
    async def main() -> None:
        async with router_world("d", "p", labels=LABELS) as world:
            answer = await stuck_in(world, phase)
            held = {"d", *([] if phase in ("granting", "decoding") else ["p"])}
            world.gateway.cancel(answer)
            ended = await answer.wait()
            assert (ended.reason, ended.code) == ("abort", "")
            assert ended.usage.output_tokens == len(answer.token_ids)
            for engine_id in held if phase == "sending" else {"d"}:
                await world.engines[engine_id].saw(wire.Abort)
            await world.check_clean()
            for engine in world.engines.values():
                engine.resume(*engine.paused)  # what comes now is late and does no harm
            world.gateway.cancel(answer)

    main()


@pytest.mark.parametrize("phase", PHASES)
def test_the_deadline_ends_it_in_any_phase(phase: str) -> None:
    @in_loop
    async def main() -> None:
        async with router_world("d", "p", labels=LABELS) as world:
            answer = await stuck_in(world, phase, ttl_s=1.0)
            ended = await answer.wait()
            assert (ended.reason, ended.code) == ("error", "deadline_exceeded")
            assert ended.phases.total_s >= 1.0
            await world.check_clean()

    main()


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("lost", ["d", "p"])
def test_a_request_outlives_the_loss_of_an_engine(phase: str, lost: str) -> None:
    @in_loop
    async def main() -> None:
        async with router_world("d", "p", labels=LABELS, call_timeout_s=3.0) as world:
            answer = await stuck_in(world, phase)
            world.engines[lost].die()
            other = world.engines["p" if lost == "d" else "d"]
            await eventually(lambda: len(world.router.registry.joined()) == 1, f"{lost} is lost")
            other.resume(*other.paused)
            ended = await answer.wait()
            assert (ended.reason, ended.code) == ("length", "")
            assert answer.token_ids == expected_output(4)
            assert other.engine_id in ended.engines
            await eventually(other.is_clean, "the other engine holds nothing")
            await world.check_clean()

    main()


@in_loop
async def test_a_sender_lost_after_its_first_token_and_before_its_answer() -> None:
    """The decode engine has the token from the lane and goes on; the client's copy died with the sender."""
    async with router_world("d", "p", labels=LABELS) as world:
        d, p = world.engines["d"], world.engines["p"]
        d.manual = True
        p.paused.add("RemoteSend")
        answer = world.gateway.start(PROMPT, strategy="disaggregated")
        await d.saw(wire.StartGenerate)
        await p.saw(wire.RemoteSend)
        d.emit(wire.Delta(answer.request_id, 1, expected_output(4)[1:3]))
        p.die()
        d.manual = False
        ended = await answer.wait()
        assert (ended.reason, ended.code) == ("length", "")
        assert answer.token_ids == expected_output(4)
        await world.check_clean()


@pytest.mark.parametrize("num_delivered", [1, 2, 3])
@in_loop
async def test_a_stream_goes_on_where_it_was_cut(num_delivered: int) -> None:
    async with router_world("d", "p", labels=LABELS) as world:
        d = world.engines["d"]
        d.manual = True
        answer = world.gateway.start(PROMPT, strategy="data_parallel", logprobs=None)
        started = [e for e in world.engines.values() if e.of(wire.StartGenerate)]
        await eventually(lambda: any(e.of(wire.StartGenerate) for e in world.engines.values()), "it runs")
        started = [e for e in world.engines.values() if e.of(wire.StartGenerate)]
        if started == [d]:
            d.emit(wire.Delta(answer.request_id, 0, expected_output(4)[:num_delivered]))
            await answer.tokens(num_delivered)
            d.die()
        ended = await answer.wait()
        assert (ended.reason, ended.code) == ("length", "")
        assert answer.token_ids == expected_output(4)
        if started == [d]:
            again = world.engines["p"].of(wire.StartGenerate)[0]
            assert again.num_output_tokens == num_delivered
            assert ended.engines == ["d", "p"]


@in_loop
async def test_a_new_life_of_an_engine_does_not_end_what_the_old_one_had() -> None:
    async with router_world("d", "p", labels=LABELS) as world:
        answer = await stuck_in(world, "decoding")
        world.engines["d"].incarnation = 2  # what answers at the address is another life
        await eventually(lambda: len(world.router.registry.joined()) == 1, "d is lost")
        world.engines["p"].resume(*world.engines["p"].paused)
        ended = await answer.wait()
        assert (ended.reason, ended.code) == ("length", "")
        assert answer.token_ids == expected_output(4)
        world.engines["d"].incarnation = 1
        world.engines["d"].held.clear()


@in_loop
async def test_engines_errors_reach_the_client_with_their_code_and_hint() -> None:
    async with router_world("d", "p", labels=LABELS, call_timeout_s=1.0) as world:
        for action, error in (
            (wire.PrepRecv, CacheFull("2000 blocks", retry_after_s=0.25)),
            (wire.StartGenerate, QueueFull("full", retry_after_s=1.5)),
        ):
            for engine in world.engines.values():
                engine.failures[action] = error
            ended = (await world.gateway.generate(PROMPT, strategy="disaggregated")).result
            assert (ended.reason, ended.code) == ("error", error.code)
            assert error.detail in ended.detail
            assert ended.retry_after_s == error.retry_after_s
            for engine in world.engines.values():
                del engine.failures[action]
            await world.check_clean()


@in_loop
async def test_where_every_send_fails_one_engine_serves_it_alone_in_the_end() -> None:
    async with router_world("d", "p", labels=LABELS) as world:
        for engine in world.engines.values():
            engine.failures[wire.RemoteSend] = TransferFailed("poisoned")
        answer = await world.gateway.generate(PROMPT, strategy="disaggregated")
        assert (answer.result.reason, answer.token_ids) == ("length", expected_output(4))
        calls = [call for engine in world.engines.values() for call in engine.calls]
        assert sum(isinstance(call, wire.RemoteSend) for call in calls) == 3
        await world.check_clean()


@in_loop
async def test_a_full_engine_is_asked_again_until_it_has_room() -> None:
    async with router_world("d", "p", labels=LABELS) as world:
        d = world.engines["d"]
        d.failures[wire.PrepRecv] = CacheFull("no room", retry_after_s=0.01)
        answer = world.gateway.start(PROMPT, strategy="disaggregated")
        await d.saw(wire.PrepRecv, 3)
        d.failures.clear()
        assert (await answer.wait()).reason == "length"
        # Between two questions nothing is held, so each of them brings the prompt.
        questions = [
            w for call, w in zip(d.calls, d.with_tokens, strict=True) if isinstance(call, wire.PrepRecv)
        ]
        assert len(questions) > 3
        assert all(questions)


@in_loop
async def test_a_stall_of_our_own_loses_nobody() -> None:
    async with router_world("d", liveness=20) as world:
        d = world.engines["d"]
        d.paused.add("decode")
        answer = world.gateway.start(PROMPT)
        await d.saw(wire.StartGenerate)
        d.mute_heartbeats = True
        await world.beats(4)  # nothing of the engine is left to be read
        d.mute_heartbeats = False
        time.sleep(1.5 * 20 * INTERVAL_S)  # noqa: ASYNC251  (nothing runs: that is the point)
        await world.beats(4)
        d.resume("decode")
        assert (await answer.wait()).reason == "length"
        assert len(d.hellos) == len(world.gateway.welcomes) == 1


@in_loop
async def test_an_error_of_the_decode_engine_in_mid_stream() -> None:
    async with router_world("d") as world:
        d = world.engines["d"]
        d.manual = True
        answer = world.gateway.start(PROMPT)
        await d.saw(wire.StartGenerate)
        d.emit(wire.Delta(answer.request_id, 0, [5, 6]))
        await answer.tokens(2)
        d.finish(answer.request_id, 2, "error", code="internal", detail="step failed")
        ended = await answer.wait()
        assert (ended.reason, ended.code, ended.usage.output_tokens) == ("error", "internal", 2)


@in_loop
async def test_duplicated_deltas_are_dropped_and_a_gap_is_filled() -> None:
    async with router_world("d") as world:
        d = world.engines["d"]
        d.manual = True
        answer = world.gateway.start(PROMPT)
        await d.saw(wire.StartGenerate)
        rid = answer.request_id
        d.emit(wire.Delta(rid, 0, [5, 6]), wire.Delta(rid, 0, [5, 6]), wire.Delta(rid, 1, [6, 7]))
        await answer.tokens(3)
        assert answer.token_ids == [5, 6, 7]
        d.emit(wire.Delta(rid, 4, [9]))
        await d.saw(wire.Abort)
        await d.saw(wire.StartGenerate, 2)
        assert d.of(wire.StartGenerate)[1].num_output_tokens == 3
        d.emit(wire.Delta(rid, 3, [8]))
        d.finish(rid, 4)
        ended = await answer.wait()
        assert (ended.reason, ended.code) == ("length", "")
        assert answer.token_ids == [5, 6, 7, 8]


@in_loop
async def test_the_first_token_of_the_sender_does_not_wait_for_the_decode_engine() -> None:
    async with router_world("d", "p", labels=LABELS) as world:
        d = world.engines["d"]
        d.paused.add("decode")
        answer = world.gateway.start(PROMPT, strategy="disaggregated")
        await answer.tokens(1)
        assert d.num_deltas == 0
        start = d.of(wire.StartGenerate)[0]
        assert start.await_first
        # A decode engine that repeats token 0 is not heard twice.
        d.emit(wire.Delta(answer.request_id, 0, expected_output(3)))
        await answer.tokens(3)
        d.resume("decode")
        await answer.wait()
        assert answer.token_ids == expected_output(4)


@in_loop
async def test_tokens_of_the_decode_engine_prove_that_the_send_was_whole() -> None:
    async with router_world("d", "p", labels=LABELS) as world:
        d, p = world.engines["d"], world.engines["p"]
        d.manual = True
        p.paused.add("RemoteSend")
        answer = world.gateway.start(PROMPT, strategy="balanced")
        await d.saw(wire.StartGenerate)
        await p.saw(wire.RemoteSend)
        d.emit(wire.Delta(answer.request_id, 0, [5]))
        await answer.tokens(1)
        p.failures[wire.RemoteSend] = TransferFailed("the answer is late and wrong")
        p.resume("RemoteSend")
        await eventually(lambda: not p.held or p.is_clean(), "failed")
        d.emit(wire.Delta(answer.request_id, 1, [6]))
        await answer.tokens(2)
        d.finish(answer.request_id, 2)
        assert (await answer.wait()).reason == "length"


@in_loop
async def test_an_acceptance_that_does_not_come_is_not_waited_for_until_the_deadline() -> None:
    async with router_world("d", call_timeout_s=0.2) as world:
        d = world.engines["d"]
        d.paused.add("StartGenerate")
        ended = (await world.gateway.generate(PROMPT)).result
        assert (ended.reason, ended.code) == ("error", "deadline_exceeded")
        await d.saw(wire.Abort)


# --- ends ------------------------------------------------------------------------------------------


@in_loop
async def test_phases_add_up_and_the_log_has_one_canonical_line() -> None:
    async with router_world("d", "p", labels=LABELS) as world:
        with structlog.testing.capture_logs() as logs:
            answers = [
                await world.gateway.generate(PROMPT, strategy=item.name, max_tokens=3) for item in BUILT_IN
            ]
            refused = await world.gateway.generate([])
        for answer in answers:
            phases = answer.result.phases
            parts = [getattr(phases, n) for n in phases.__struct_fields__ if n != "total_s"]
            assert min(parts) >= 0
            assert math.isclose(sum(parts), phases.total_s, abs_tol=1e-6)
            assert phases.total_s > 0
        lines = {e["request_id"]: e for e in logs if e["event"] == log.REQUEST_FINISHED}
        assert len([e for e in logs if e["event"] == log.REQUEST_FINISHED]) == len(lines) == len(answers) + 1
        for item, answer in zip(BUILT_IN, answers, strict=True):
            line = lines[answer.request_id]
            assert (line["strategy"], line["reason"], line["output_tokens"]) == (item.name, "length", 3)
            assert line["engines"] == answer.result.engines
            assert not any("token_ids" in key or key == "prompt" for key in line)
        assert lines[refused.request_id]["code"] == "invalid_request"


@in_loop
async def test_stop_ends_what_is_live_and_tells_the_engines() -> None:
    async with router_world("d", "p", labels=LABELS, check=False) as world:
        answers = [await stuck_in(world, "decoding"), world.gateway.start(PROMPT)]
        await world.engines["d"].saw(wire.StartGenerate, 2)
        world.running.cancel()
        for answer in answers:
            ended = await answer.wait()
            assert (ended.reason, ended.code) == ("error", "draining")
            assert ended.retry_after_s > 0
        await asyncio.wait([world.running])
        await world.engines["d"].saw(wire.Abort, 2)
        assert world.router.serving.book.is_zero
        assert holders(world) == []


@in_loop
async def test_a_request_that_is_cancelled_before_its_first_step_still_ends() -> None:
    async with router_world("d") as world:
        outputs: list[serving.Output] = []
        live = world.router.serving
        message = serving.Generate("early", "", SamplingParams(), 5.0)
        live.submit(b"me", message, encode_tokens(PROMPT), outputs.append)
        live.cancel(b"me", "early")
        await eventually(lambda: outputs, "the end")
        assert [output.ended.reason for output in outputs if output.ended] == ["abort"]
        assert world.calls() == []


@in_loop
async def test_many_requests_with_random_cancels_leave_nothing() -> None:
    """Two hundred requests over all strategies; every third is cancelled at some point."""
    async with router_world("a", "b", "c", call_timeout_s=10.0) as world:
        names = world.router.strategies.names
        answers: list[Answer] = []
        for number in range(200):
            prompt = [number % 997, *range(number % 90)]
            answers.append(
                world.gateway.start(prompt, strategy=names[number % len(names)], max_tokens=1 + number % 7)
            )
            if number % 3 == 0:
                world.gateway.cancel(answers[number // 2])
            if number % 10 == 0:
                await asyncio.sleep(0)
        for answer in answers:
            ended = await answer.wait()
            assert ended.reason in ("length", "abort"), ended
            assert answer.token_ids == expected_output(len(answer.token_ids))
            if ended.reason == "length":
                assert len(answer.token_ids) == ended.usage.output_tokens
