"""A router that checks, between scripted engines: what it asks, what it finds, and whom it keeps waiting."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from microserve.protocol.errors import CacheFull
from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.check import DIFFERS, EQUAL, UNFINISHED, PairCheck, Suspect
from microserve.protocol.messages.numerics import Numerics
from microserve.services.router.check import check as module
from microserve.services.router.check.question import MAX_TOKENS
from tests.support.router.router_world import World, eventually, expected_output, in_loop, router_world
from tests.support.router.scripted_engine import Held

pytestmark = pytest.mark.slow

EXACT = Numerics("exact", is_exact=True)
IDLE = wire.EngineLoad(free_blocks=1000)
INTERVAL_S = 0.02


@asynccontextmanager
async def checking(*engine_ids: str, numerics: Numerics = EXACT, **fields: Any) -> AsyncIterator[World]:
    """A world whose router checks all the time; at the end it rests, and everything must be clean."""
    async with router_world(check_interval_s=INTERVAL_S, **fields) as world:
        for engine_id in engine_ids:
            world.add_engine(engine_id, numerics=numerics).load = IDLE
        await world.list_engines()
        yield world
        await rest(world)


async def rest(world: World) -> None:
    """No more checks: nobody has room for one."""
    for engine in world.engines.values():
        engine.load = msgspec.structs.replace(engine.load, num_waiting=1)
    connections = [c for c in world.router.registry.joined() if not c.is_leaving]
    await eventually(lambda: all(c.load.num_waiting for c in connections if c.is_joined), "all are busy")
    skipped = world.router.check.book.num_skipped
    await eventually(lambda: world.router.check.book.num_skipped > skipped + 1, "nobody is checked")


async def have(world: World, outcome: str, count: int = 1) -> None:
    """Wait for so many more checks that came to that."""
    numbers = world.router.check.book.num_by_outcome
    wanted = numbers[outcome] + count
    await eventually(lambda: numbers[outcome] >= wanted, f"{count} checks: {outcome}")


def told(world: World) -> dict[tuple[str, str], PairCheck]:
    """What the index has heard last."""
    watch = world.index.last_watch
    return {} if watch is None else {check.pair: check for check in watch.checks}


def received(held: Held) -> bool:
    return held.generating_grant is not None


def is_check(held: Held) -> bool:
    """It would err with what it sends to itself, too, for all that it knows."""
    return held.generate is not None and held.generate.salt.startswith("check-")


@in_loop
async def test_each_pair_is_asked_cold_cached_and_with_kv_of_the_other() -> None:
    async with checking("a", "b") as world:
        await have(world, EQUAL, 4)
        await eventually(lambda: {("a", "b"), ("b", "a")} <= told(world).keys(), "the index hears of both")
        check = told(world)["a", "b"]
        assert (check.outcome, check.compared, check.differs) == (EQUAL, "bits", "")
        assert check.num_tokens > 0
        assert not world.router.check.suspects
        starts = world.engines["a"].of(wire.StartGenerate)
        salts = [start.salt for start in starts]
        assert all(each.startswith("check-") for each in salts)
        sends = world.engines["a"].of(wire.RemoteSend)
        for send in sends:
            assert salts.count(send.salt) == 2, "cold and cached, then the transfer, of one prompt"
        assert len({send.salt for send in sends}) == len(sends), "each check has a namespace of its own"
        sampling = starts[0].sampling
        assert (sampling.temperature, sampling.max_tokens) == (0.0, MAX_TOKENS)


@in_loop
async def test_a_transfer_that_changes_a_token_takes_the_pair_out_of_use_until_it_is_equal_again() -> None:
    async with checking("a", "b") as world:
        world.engines["b"].errs = lambda held: received(held) and is_check(held)
        await have(world, DIFFERS)
        connections = {c.engine_id: c for c in world.router.registry.joined()}
        assert ("b" in connections["a"].barred, "a" in connections["b"].barred) == (True, False)
        await eventually(lambda: told(world).get(("a", "b")), "the index hears of it")
        assert (told(world)["a", "b"].outcome, told(world)["a", "b"].differs) == (DIFFERS, "transferred")

        world.forget_calls()
        answer = await world.gateway.generate([*range(64)], strategy="disaggregated", max_tokens=4)
        assert answer.token_ids == expected_output(4)
        assert answer.ended is not None
        assert answer.ended.engines == ["b"], "no KV goes between them, nor from the sender to itself"
        assert not answer.ended.alone, "the strategy itself found its way"

        world.engines["b"].errs = lambda held: False
        await eventually(lambda: not world.router.check.suspects, "they are equal again")
        assert not connections["a"].barred
        answer = await world.gateway.generate([*range(64)], strategy="disaggregated", max_tokens=4)
        assert answer.ended is not None
        assert len(answer.ended.engines) == 2


@in_loop
async def test_an_engine_that_does_not_agree_with_its_own_cache_exchanges_kv_with_nobody() -> None:
    async with checking("a", "b", "c") as world:
        seen: set[str] = set()

        def again(held: Held) -> bool:
            assert held.generate is not None
            salt = held.generate.salt
            is_again = salt in seen and not received(held)
            seen.add(salt)
            return is_again

        world.engines["a"].errs = again
        await have(world, DIFFERS)
        barred = {c.engine_id: set(c.barred) for c in world.router.registry.joined()}
        assert barred == {"a": {"a", "b", "c"}, "b": {"a"}, "c": {"a"}}
        world.engines["a"].errs = lambda held: False
        await eventually(lambda: not world.router.check.suspects, "it agrees again")


@in_loop
async def test_what_another_router_found_counts_here() -> None:
    async with checking("a", "b", numerics=Numerics("")) as world:  # nothing is checked here
        world.index.suspects = [Suspect("a", "b")]
        await eventually(lambda: world.router.check.suspects.pairs == {("a", "b")}, "it is told")
        answer = await world.gateway.generate([*range(64)], strategy="disaggregated", max_tokens=4)
        assert answer.ended is not None
        assert len(answer.ended.engines) == 1
        world.index.suspects = []
        await eventually(lambda: not world.router.check.suspects, "it is told again")


@in_loop
async def test_routers_share_the_pairs() -> None:
    async with checking("a", "b") as world:
        world.index.routers = ["", world.router.identity.router_id]  # ours is the second of two
        await eventually(lambda: len(world.router.check._routers) == 2, "it is told of both")
        world.forget_calls()
        await have(world, EQUAL, 3)
        assert not world.engines["a"].of(wire.RemoteSend)[1:], "the first pair is the other one's"
        assert len(world.engines["b"].of(wire.RemoteSend)) >= 2


@pytest.mark.parametrize("how", ["full", "lost", "silent answers"])
def test_an_engine_that_fails_is_no_difference(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DEADLINE_S", 0.3)

    @in_loop
    async def main() -> None:
        async with checking("a", "b", check=how != "lost") as world:
            await have(world, EQUAL)
            other, numbers = world.engines["b"], world.router.check.book.num_by_outcome
            if how == "full":
                other.failures[wire.PrepRecv] = CacheFull("no blocks", retry_after_s=0.01)
            elif how == "lost":
                other.paused.add("decode")
                await eventually(lambda: any(held.generate for held in other.held.values()), "it is asked")
                other.die()
            else:
                other.paused.add("decode")
            await eventually(lambda: numbers[UNFINISHED], "a check that came to nothing")
            assert not world.router.check.suspects
            assert not numbers[DIFFERS]
            other.failures.clear()
            other.resume("decode")

    main()


@in_loop
async def test_a_check_keeps_no_engine_that_drains() -> None:
    async with checking("a", "b") as world:
        leaving = world.engines["b"]
        leaving.paused.add("decode")
        await eventually(lambda: any(held.generate for held in leaving.held.values()), "it is asked")
        leaving.load = msgspec.structs.replace(IDLE, draining=True)
        numbers = world.router.check.book.num_by_outcome
        await eventually(lambda: numbers[UNFINISHED], "it is over", timeout_s=module.DEADLINE_S / 2)
        await eventually(leaving.is_clean, "it holds nothing of it")
        assert not world.router.check.suspects


@in_loop
async def test_a_router_ends_in_the_midst_of_a_check() -> None:
    async with router_world(check_interval_s=INTERVAL_S, check=False) as world:
        for name in ("a", "b"):
            engine = world.add_engine(name, numerics=EXACT)
            engine.load = IDLE
            engine.paused.add("decode")
        await world.list_engines()
        everybody = world.engines.values()
        await eventually(lambda: any(engine.held for engine in everybody), "one is asked")
        world.running.cancel()
        await eventually(world.running.done, "the router ends", timeout_s=module.DEADLINE_S / 2)


@in_loop
async def test_whoever_has_work_waiting_is_left_alone() -> None:
    async with checking("a", "b") as world:
        await rest(world)
        world.forget_calls()
        skipped = world.router.check.book.num_skipped
        await eventually(lambda: world.router.check.book.num_skipped > skipped + 3, "turns are let go")
        assert not world.calls()


@in_loop
async def test_no_class_no_promise_and_an_interval_of_0_no_check() -> None:
    async with router_world("a", "b", check_interval_s=INTERVAL_S) as world:
        await eventually(lambda: world.router.check.book.num_skipped > 3, "turns")
        assert not world.calls()
    async with router_world("a", "b", check_interval_s=0.0) as world:
        await world.beats(2)
        assert not world.calls()
        assert not world.router.check.book.num_skipped
