"""Every call ends: by answer, failure, deadline or loss of the peer."""

from __future__ import annotations

import asyncio

import pytest

from microserve.protocol.bus.calls import Calls
from microserve.protocol.errors import CacheFull, DeadlineExceeded, EngineLost


def test_ids_count_up_from_one() -> None:
    calls: Calls[str] = Calls("peer")

    assert [calls.next_id(), calls.next_id()] == [1, 2]  # 0 is for failures of no call


def test_answer_reaches_its_own_call() -> None:
    async def test() -> None:
        calls: Calls[str] = Calls("peer")
        first, second = calls.open(1), calls.open(2)
        assert len(calls) == 2

        assert calls.resolve(2, "two")
        assert calls.resolve(1, "one")

        assert await calls.wait(1, first, 1.0) == "one"
        assert await calls.wait(2, second, 1.0) == "two"
        assert len(calls) == 0

    asyncio.run(test())


def test_answer_may_come_before_the_wait_and_only_once() -> None:
    async def test() -> None:
        calls: Calls[str] = Calls("peer")
        future = calls.open(1)

        assert calls.resolve(1, "one")
        assert not calls.resolve(1, "again")
        assert not calls.fail(1, CacheFull())
        assert await calls.wait(1, future, 1.0) == "one"

    asyncio.run(test())


def test_failure_is_raised_where_the_call_waits() -> None:
    async def test() -> None:
        calls: Calls[str] = Calls("peer")
        future = calls.open(1)
        assert calls.fail(1, CacheFull("no blocks", retry_after_s=2.0))

        with pytest.raises(CacheFull) as failed:
            await calls.wait(1, future, 1.0)
        assert failed.value.retry_after_s == 2.0

    asyncio.run(test())


def test_deadline_names_the_peer_and_forgets_the_call() -> None:
    async def test() -> None:
        calls: Calls[str] = Calls("engine e1")
        with pytest.raises(DeadlineExceeded, match=r"engine e1 did not answer within 0\.010 s"):
            await calls.wait(1, calls.open(1), 0.01)

        assert len(calls) == 0
        assert not calls.resolve(1, "late")

    asyncio.run(test())


def test_caller_that_gives_up_leaves_nothing() -> None:
    async def test() -> None:
        calls: Calls[str] = Calls("peer")
        future = calls.open(1)
        waiting = asyncio.ensure_future(calls.wait(1, future, 10.0))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

        assert len(calls) == 0
        assert not calls.fail(1, EngineLost())

    asyncio.run(test())


def test_answer_to_nobody_is_no_error() -> None:
    calls: Calls[str] = Calls("peer")

    assert not calls.resolve(7, "x")
    assert not calls.fail(7, EngineLost())


def test_loss_of_the_peer_ends_every_call() -> None:
    async def test() -> None:
        calls: Calls[str] = Calls("peer")
        waiting = [asyncio.ensure_future(calls.wait(i, calls.open(i), 10.0)) for i in range(3)]
        await asyncio.sleep(0)
        calls.fail_all(EngineLost("gone"))

        assert len(calls) == 0
        for outcome in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(outcome, EngineLost)

    asyncio.run(test())
