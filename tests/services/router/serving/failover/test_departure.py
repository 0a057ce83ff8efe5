"""Requests on an engine that drains: moved with their KV, begun again elsewhere, or left in peace."""

from __future__ import annotations

import msgspec
import pytest
import structlog

from microserve.protocol import log
from microserve.protocol.errors import CacheFull, Draining, MeshError, QueueFull, TransferFailed
from microserve.protocol.messages import engine as wire
from microserve.services.router.serving.failover import MAX_ATTEMPTS
from microserve.services.router.strategies.placing.data_parallel import data_parallel
from tests.support.bus.gateway_peer import Answer
from tests.support.router.router_world import (
    World,
    eventually,
    expected_output,
    in_loop,
    router_world,
    start_with,
)
from tests.support.router.scripted_engine import BLOCK_SIZE, ScriptedEngine, output_token

PROMPT = list(range(50))
MAX_TOKENS = 40
LABELS = {"d": ["decode"], "p": ["prefill"]}


def drain(engine: ScriptedEngine) -> None:
    engine.load = msgspec.structs.replace(engine.load, draining=True)


def undrain(engine: ScriptedEngine) -> None:
    engine.load = msgspec.structs.replace(engine.load, draining=False)


async def decoding_on(world: World, engine_id: str, count: int, strategy: str = "data_parallel") -> Answer:
    """A request that has ``count`` tokens from one engine; the others joined the mesh meanwhile."""
    engine = world.engines[engine_id]
    await world.list_engines(engine)
    engine.manual = True
    answer = world.gateway.start(PROMPT, max_tokens=MAX_TOKENS, strategy=strategy)
    await engine.saw(wire.StartGenerate)
    await emit(engine, answer, count)
    await world.list_engines()
    return answer


async def emit(engine: ScriptedEngine, answer: Answer, count: int) -> None:
    begin = len(answer.token_ids)
    if count:
        tokens = [output_token(position) for position in range(begin, begin + count)]
        engine.emit(wire.Delta(answer.request_id, begin, tokens))
        await answer.tokens(begin + count)


async def whole(answer: Answer) -> None:
    ended = await answer.wait()
    assert (ended.reason, ended.code) == ("length", "")
    assert answer.token_ids == expected_output(MAX_TOKENS)


@pytest.mark.parametrize("count", [1, 13, 14, 15, 30])
def test_a_stream_goes_on_elsewhere_with_its_kv(count: int) -> None:
    @in_loop
    async def main() -> None:
        async with router_world() as world:
            a, b = world.add_engine("a"), world.add_engine("b")
            answer = await decoding_on(world, "a", count)
            with structlog.testing.capture_logs() as logs:
                drain(a)
                await whole(answer)
            num_tokens = len(PROMPT) + count
            end = (num_tokens - 1) // BLOCK_SIZE * BLOCK_SIZE
            kinds = [type(call).__name__ for call in a.calls]
            assert kinds[:3] == ["StartGenerate", "Abort", "RemoteSend"]
            [send], [prep], [start] = a.of(wire.RemoteSend), b.of(wire.PrepRecv), b.of(wire.StartGenerate)
            assert prep.end == start.begin == send.end == end
            assert (send.begin, send.sampling) == (0, None)
            assert start.num_output_tokens == count
            [moved] = [e for e in logs if e["event"] == log.REQUEST_MOVED]
            assert (moved["source"], moved["target"], moved["tokens"]) == ("a", "b", end)
            [line] = [e for e in logs if e["event"] == log.REQUEST_CONTINUED]
            assert line["log_level"] == "info"
            assert answer.result.engines == ["a", "b"]

    main()


@in_loop
async def test_what_the_target_has_is_not_sent_and_the_leaving_engine_is_told() -> None:
    async with router_world() as world:
        a, b = world.add_engine("a"), world.add_engine("b")
        b.matched = 1000
        answer = await decoding_on(world, "a", 5)
        drain(a)
        await whole(answer)
        assert a.of(wire.RemoteSend) == []
        assert len(a.of(wire.Abort)) == 2  # of the stream, and: nobody will come


@in_loop
async def test_without_a_token_there_is_nothing_to_move() -> None:
    async with router_world() as world:
        a, b = world.add_engine("a"), world.add_engine("b")
        answer = await decoding_on(world, "a", 0)
        drain(a)
        await whole(answer)
        assert a.of(wire.RemoteSend) == b.of(wire.PrepRecv) == []
        assert len(b.of(wire.StartGenerate)) == 1


@in_loop
async def test_the_last_engine_keeps_its_requests_until_another_comes() -> None:
    async with router_world() as world:
        a = world.add_engine("a")
        answer = await decoding_on(world, "a", 3)
        drain(a)
        await eventually(lambda: not world.router.registry.usable(), "it is known to drain")
        await world.beats(3)
        await emit(a, answer, 2)
        assert a.of(wire.Abort) == []
        b = world.add_engine("b")
        world.index.set(engine.info for engine in (a, b))
        await whole(answer)
        assert b.of(wire.StartGenerate)[0].num_output_tokens == 5


@in_loop
async def test_alone_it_may_finish_what_it_has() -> None:
    async with router_world() as world:
        a = world.add_engine("a")
        answer = await decoding_on(world, "a", 3)
        drain(a)
        await eventually(lambda: not world.router.registry.usable(), "it is known to drain")
        await emit(a, answer, MAX_TOKENS - 3)
        a.finish(answer.request_id, MAX_TOKENS)
        await whole(answer)


@pytest.mark.slow
@in_loop
async def test_more_moves_than_attempts() -> None:
    """A long stream outlives any number of rolling restarts: leaving is no failure, and suspects nobody."""
    async with router_world() as world:
        a, b = world.add_engine("a"), world.add_engine("b")
        answer = await decoding_on(world, "a", 2)
        b.manual = True
        here, there = a, b
        for number in range(2 * MAX_ATTEMPTS):
            count = len(there.of(wire.StartGenerate))
            drain(here)
            await there.saw(wire.StartGenerate, count + 1)
            await emit(there, answer, 2)
            undrain(here)
            await eventually(lambda: len(world.router.registry.usable()) == 2, f"back after move {number}")
            here, there = there, here
        here.manual = False
        here.resume()
        await whole(answer)
        assert len(a.of(wire.RemoteSend)) + len(b.of(wire.RemoteSend)) == 2 * MAX_ATTEMPTS


@pytest.mark.parametrize(
    ("engine_id", "action", "error"),
    [
        ("a", wire.RemoteSend, TransferFailed("poisoned")),
        ("a", wire.RemoteSend, QueueFull("full", retry_after_s=1.0)),
        ("b", wire.PrepRecv, CacheFull("no room", retry_after_s=0.5)),
        ("b", wire.PrepRecv, Draining("so does this one", retry_after_s=1.0)),
    ],
)
def test_a_move_that_fails_gives_way_to_the_operators_strategy(
    engine_id: str, action: type, error: MeshError
) -> None:
    @in_loop
    async def main() -> None:
        async with router_world() as world:
            a, b = world.add_engine("a"), world.add_engine("b")
            answer = await decoding_on(world, "a", 7)
            world.engines[engine_id].failures[action] = error
            with structlog.testing.capture_logs() as logs:
                drain(a)
                await whole(answer)
            start = b.of(wire.StartGenerate)[-1]
            assert (start.begin, start.grant_id, start.num_output_tokens) == (0, None, 7)
            assert not [e for e in logs if e["event"] == log.REQUEST_MOVED]

    main()


@in_loop
async def test_the_target_dies_under_the_move() -> None:
    async with router_world() as world:
        a, b, c = (world.add_engine(name) for name in "abc")
        answer = await decoding_on(world, "a", 7)
        a.paused.add("RemoteSend")
        drain(a)
        await a.saw(wire.RemoteSend)
        target, other = (b, c) if b.of(wire.StartGenerate) else (c, b)
        await target.saw(wire.StartGenerate)
        target.die()
        await whole(answer)
        assert len(other.of(wire.StartGenerate)) == 1
        a.resume("RemoteSend")


@in_loop
async def test_the_leaving_engine_dies_under_the_move() -> None:
    async with router_world() as world:
        a, b = world.add_engine("a"), world.add_engine("b")
        answer = await decoding_on(world, "a", 7)
        a.paused.add("RemoteSend")
        drain(a)
        await a.saw(wire.RemoteSend)
        a.die()
        await whole(answer)
        assert len(b.of(wire.StartGenerate)) == 2


@pytest.mark.parametrize("held", ["PrepRecv", "RemoteSend", "StartGenerate", "decode"])
def test_a_cancel_during_the_move_leaves_nothing(held: str) -> None:
    @in_loop
    async def main() -> None:
        async with router_world() as world:
            a, b = world.add_engine("a"), world.add_engine("b")
            answer = await decoding_on(world, "a", 7)
            (a if held == "RemoteSend" else b).paused.add(held)
            drain(a)
            if held == "RemoteSend":
                await a.saw(wire.RemoteSend)
            else:
                await b.saw(wire.PrepRecv if held == "PrepRecv" else wire.StartGenerate)
            world.gateway.cancel(answer)
            assert (await answer.wait()).reason == "abort"
            for engine in (a, b):
                engine.resume(*engine.paused)

    main()


@in_loop
async def test_a_send_of_a_leaving_engine_is_let_finish() -> None:
    async with router_world("d", "p", "q", labels={**LABELS, "q": ["other"]}) as world:
        d, p = world.engines["d"], world.engines["p"]
        p.paused.add("RemoteSend")
        answer = world.gateway.start(PROMPT, max_tokens=MAX_TOKENS, strategy="disaggregated")
        await p.saw(wire.RemoteSend)
        await d.saw(wire.StartGenerate)
        drain(p)
        await eventually(lambda: len(world.router.registry.usable()) == 2, "it is known to drain")
        await world.beats(2)
        p.resume("RemoteSend")
        await whole(answer)
        assert p.of(wire.Abort) == []
        assert len(d.of(wire.StartGenerate)) == 1


@in_loop
async def test_an_engine_that_refuses_new_work_has_not_failed() -> None:
    """More refusals than attempts, and those who took part are no suspects."""
    async with router_world("d", "p", labels=LABELS, call_timeout_s=30.0) as world:
        d = world.engines["d"]
        d.failures[wire.PrepRecv] = Draining("no new work", retry_after_s=1.0)
        answer = world.gateway.start(PROMPT, max_tokens=MAX_TOKENS, strategy="disaggregated")
        await d.saw(wire.PrepRecv, MAX_ATTEMPTS + 2)
        d.failures.clear()
        await whole(answer)
        assert len(world.engines["p"].of(wire.RemoteSend)) == 1


@in_loop
async def test_a_strategys_own_failures_in_the_second_attempt_count_as_ever() -> None:
    async with router_world() as world:
        a, b = world.add_engine("a"), world.add_engine("b")
        name = start_with(world, data_parallel.function)
        answer = await decoding_on(world, "a", 3, strategy=name)
        b.failures[wire.PrepRecv] = TransferFailed("no move")
        b.failures[wire.StartGenerate] = TransferFailed("nothing works here")
        drain(a)
        ended = await answer.wait()
        assert (ended.reason, ended.code) == ("error", "transfer_failed")
        assert answer.token_ids == expected_output(3)
        assert len(b.of(wire.StartGenerate)) == MAX_ATTEMPTS
