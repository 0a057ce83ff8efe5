"""One engine, one connection: hello, liveness, credit, aborts, answers that come late or wrong."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from microserve.protocol.bus.codec import Channel
from microserve.protocol.bus.transport import ZmqBus
from microserve.protocol.errors import CacheFull, DeadlineExceeded, EngineLost, MeshError, PeerError
from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.protocol.settings.settings import BusSettings
from microserve.services.links.engine import EngineConnection, RouterIdentity
from microserve.services.links.stream import TokenStream
from tests.support.router.fabric import Fabric
from tests.support.router.router_world import INTERVAL_S, LIVENESS, eventually, in_loop
from tests.support.router.scripted_engine import ScriptedEngine


@asynccontextmanager
async def connection_to(
    *,
    join: bool = True,
    credit: int = 64,
    liveness: int = LIVENESS,
    stuck_s: float = 20.0,
    **info: object,
) -> AsyncIterator[tuple[EngineConnection, ScriptedEngine]]:
    bus = ZmqBus(linger_s=0.05)
    engine = ScriptedEngine(bus, Fabric(), "e", 5, interval_s=INTERVAL_S)
    settings = BusSettings(heartbeat_interval_s=INTERVAL_S, liveness=liveness, credit=credit, stuck_s=stuck_s)
    described = wire.EngineInfo(**{**_fields(engine.info), **info})  # type: ignore[arg-type]
    connection = EngineConnection(bus, described, RouterIdentity("r", 77), settings, call_timeout_s=1.0)
    running: asyncio.Task[MeshError] | None = None
    try:
        if join:
            await connection.join()
            running = asyncio.create_task(connection.run())
        yield connection, engine
    finally:
        connection.end(EngineLost("the test is over"))
        if running is not None:
            await running
        engine.close()
        bus.close()


def _fields(info: wire.EngineInfo) -> dict[str, object]:
    return {name: getattr(info, name) for name in info.__struct_fields__}


def start(call_id: int) -> wire.StartGenerate:
    return wire.StartGenerate(call_id, "r1", 0, SamplingParams(max_tokens=8), 10.0)


@in_loop
async def test_hello_names_the_router_and_opens_the_window() -> None:
    async with connection_to(credit=9) as (connection, engine):
        assert engine.hellos == [wire.Hello(1, "r", 77, 9)]
        assert connection.is_joined
        await eventually(lambda: engine.pings >= 2, "pings")


@in_loop
async def test_an_engine_that_does_not_answer_is_not_joined() -> None:
    async with connection_to(join=False, liveness=5) as (connection, engine):
        engine.silent = True
        with pytest.raises(DeadlineExceeded):
            await connection.join()
        assert connection.is_ended
        assert not connection.is_joined


@in_loop
async def test_another_life_at_the_address_is_not_joined() -> None:
    async with connection_to(join=False, incarnation=4) as (connection, _):
        with pytest.raises(EngineLost, match="another life"):
            await connection.join()
        assert connection.is_ended


@pytest.mark.slow
@in_loop
async def test_silence_fails_everything_that_waits() -> None:
    async with connection_to(liveness=20) as (connection, engine):
        stream = TokenStream("r1", "e")
        connection.streams.add(stream)
        call_id, future = connection.begin(wire.Stats)
        engine.silent = True
        with pytest.raises(EngineLost, match="fell silent"):
            await connection.wait(call_id, future, 10.0)
        with pytest.raises(EngineLost):
            await stream.next()
        with pytest.raises(EngineLost):
            connection.begin(wire.Stats)
        connection.abort("r1")
        assert connection.is_idle
        assert not connection.has_waiters


@in_loop
async def test_work_without_progress_is_a_loss_although_heartbeats_come() -> None:
    async with connection_to(stuck_s=0.3) as (connection, engine):
        stream = TokenStream("r1", "e")
        connection.streams.add(stream)
        engine.load = wire.EngineLoad(progress=10, num_running=1)
        with pytest.raises(EngineLost, match="makes no progress"):
            async with asyncio.timeout(30):
                await stream.next()


@pytest.mark.slow
@pytest.mark.parametrize("load", [wire.EngineLoad(num_waiting=3), wire.EngineLoad(num_running=1)])
def test_waiting_or_progressing_engines_are_not_stuck(load: wire.EngineLoad) -> None:
    @in_loop
    async def main() -> None:
        async with connection_to(stuck_s=1.0) as (connection, engine):
            engine.load = load  # who waits may rightly wait for another engine
            engine.progresses = load.num_running > 0
            pings = engine.pings
            await eventually(lambda: engine.pings > pings + 3, "time has passed")
            assert connection.is_joined

    main()


@in_loop
async def test_an_engine_that_does_not_know_us_any_more_is_lost_at_once() -> None:
    """It has restarted at the same address, or gave us up while we stood still."""
    async with connection_to() as (connection, engine):
        stream = TokenStream("r1", "e")
        connection.streams.add(stream)
        engine.emit(wire.Delta("r1", 0, [5]))
        assert (await stream.next()).token_ids == [5]
        engine.refuse("say Hello first")
        with pytest.raises(EngineLost, match="refuses this connection: say Hello first"):
            await stream.next()


@in_loop
async def test_a_failure_is_no_sign_of_life() -> None:
    async with connection_to(liveness=20) as (connection, engine):
        engine.mute_heartbeats = True

        async with asyncio.timeout(30):
            while not connection.is_ended:
                engine.refuse("see the log", code="internal")
                await asyncio.sleep(INTERVAL_S)


@in_loop
async def test_a_heartbeat_of_a_new_life_is_the_end() -> None:
    async with connection_to() as (connection, engine):
        engine.incarnation = 6
        await eventually(lambda: connection.is_ended, "ended")
        with pytest.raises(EngineLost, match="new life"):
            connection.begin(wire.Stats)


@in_loop
async def test_credit_is_given_back_half_a_window_at_a_time() -> None:
    async with connection_to(credit=8) as (connection, engine):
        stream = TokenStream("r1", "e")
        connection.streams.add(stream)
        for position in range(12):
            engine.emit(wire.Delta("r1", position, [position]))
        tokens: list[int] = []
        while len(tokens) < 12:
            tokens += (await stream.next()).token_ids
        await eventually(lambda: engine.credits == [4, 4, 4], "credit")


@in_loop
async def test_an_engine_without_credit_merges_and_nothing_is_lost() -> None:
    async with connection_to(credit=2) as (connection, engine):
        stream = TokenStream("r1", "e")
        connection.streams.add(stream)
        prompt = b"\1\0\0\0"
        await connection.call(
            lambda i: wire.StartGenerate(i, "r1", 0, SamplingParams(max_tokens=50), 9.0),
            wire.Accepted,
            prompt,
            timeout_s=5.0,
        )
        tokens: list[int] = []
        while True:
            chunk = await stream.next()
            tokens += chunk.token_ids
            if chunk.finished is not None:
                break
        assert len(tokens) == 50
        assert engine.num_deltas < 20


@in_loop
async def test_an_abort_is_repeated_until_it_is_confirmed() -> None:
    async with connection_to() as (connection, engine):
        engine.paused.add("Abort")
        connection.abort("r1")
        await engine.saw(wire.Abort, 3)
        assert {call.request_id for call in engine.of(wire.Abort)} == {"r1"}
        assert len({call.call_id for call in engine.of(wire.Abort)}) >= 3
        assert not connection.is_idle
        engine.resume("Abort")
        await eventually(lambda: connection.is_idle, "confirmed")


@in_loop
async def test_late_answers_and_deltas_are_dropped() -> None:
    async with connection_to() as (connection, engine):
        engine.paused.add("StartGenerate")
        with pytest.raises(DeadlineExceeded):
            await connection.call(start, wire.Accepted, b"\1\0\0\0", timeout_s=0.05)
        engine.resume("StartGenerate")
        await eventually(lambda: connection.streams.late_deltas > 0, "late deltas")
        assert not connection.has_waiters


@in_loop
async def test_errors_come_back_as_they_were_raised() -> None:
    async with connection_to() as (connection, engine):
        engine.failures[wire.PrepRecv] = CacheFull("no room", field="end", retry_after_s=0.5)
        with pytest.raises(CacheFull) as caught:
            await connection.call(
                lambda i: wire.PrepRecv(i, "r1", 1, 1.0), wire.Granted, b"\1\0\0\0", timeout_s=5.0
            )
        assert (caught.value.detail, caught.value.field, caught.value.retry_after_s) == (
            "no room",
            "end",
            0.5,
        )


@in_loop
async def test_an_answer_of_the_wrong_kind_is_the_peers_fault() -> None:
    async with connection_to() as (connection, _):
        with pytest.raises(PeerError, match="answered Accepted, not Granted"):
            await connection.call(start, wire.Granted, b"\1\0\0\0", timeout_s=5.0)


@in_loop
async def test_a_snapshot_brings_its_bulk_frame() -> None:
    async with connection_to() as (connection, engine):
        engine.mute_heartbeats = True  # no empty batch comes between
        engine.store(list(range(32)))
        reply, bulk = await connection.snapshot()
        assert (reply.epoch, reply.seq) == (5, 1)
        assert bulk


@in_loop
async def test_junk_from_an_engine_is_dropped() -> None:
    async with connection_to() as (connection, engine):
        header = bytes((1, Channel.ENGINE_TO_ROUTER))
        for frames in (
            [b""],
            [header, b"junk"],
            [bytes((1, Channel.ROUTER_TO_ENGINE)), b"\x91\1"],
            [header, b"\x93\5\xc0"],
            [b"x"] * 9,
        ):
            engine._socket._socket.send(engine._peer, frames)  # without numbers
        reply, _ = await connection.snapshot()
        assert reply.epoch == 5


@in_loop
async def test_two_ends_and_a_send_after_the_end() -> None:
    async with connection_to() as (connection, engine):
        connection.end(EngineLost("first"))
        connection.end(EngineLost("second"))
        with pytest.raises(EngineLost, match="first"):
            connection.begin(wire.Stats)
        assert engine.calls == []


@in_loop
async def test_an_engine_that_closes_the_connection_is_lost_at_once() -> None:
    async with connection_to(liveness=100_000) as (connection, engine):
        stream = TokenStream("r1", "e")
        connection.streams.add(stream)
        engine.emit(wire.Delta("r1", 0, [5]))
        engine.close()
        assert (await stream.next()).token_ids == [5]
        with pytest.raises(EngineLost, match="closed the connection"):
            await stream.next()


@in_loop
async def test_an_engine_that_is_leaving_and_idle_may_close_the_connection() -> None:
    async with connection_to(liveness=100_000) as (connection, engine):
        connection.is_leaving = True
        engine.close()
        await eventually(lambda: connection.is_ended, "ended")
        with pytest.raises(EngineLost, match="has left the mesh"):
            connection.begin(wire.Stats)


@in_loop
@pytest.mark.parametrize("what", ["answer", "tokens"])
async def test_a_lost_message_ends_the_connection_with_the_next_one(what: str) -> None:
    async with connection_to(liveness=100_000) as (connection, engine):
        stream = TokenStream("r1", "e")
        connection.streams.add(stream)
        if what == "answer":
            engine.mute_heartbeats = True
        engine.lossy.lose_next_down()
        if what == "tokens":
            engine.emit(wire.Delta("r1", 0, [5]))
        else:
            connection.begin(lambda call_id: wire.Abort(call_id, "r2"))
            await engine.saw(wire.Abort)
            engine.mute_heartbeats = False
        with pytest.raises(EngineLost, match="messages were lost"):
            await stream.next()
