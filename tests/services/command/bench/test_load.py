"""Requests that are really sent, to a server that says what the test says."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import pytest

from microserve.services.command.bench.load import CLOCK, Sender, run, send_share
from microserve.services.command.bench.report import e2el_s, tpot_s, ttft_s
from microserve.services.command.bench.task import COMPLETIONS, Load, Result, Share, Words
from microserve.services.command.bench.workload.plan import plan
from microserve.services.command.client.http import Client
from tests.support.command.scripted_server import Asked, ScriptedServer, say_all, scripted_server

T = TypeVar("T")
LOAD = Load(endpoint=COMPLETIONS, model="scripted", input_len=7, output_len=2, num_requests=6)
WORDS = Words(ids=list(range(10, 90)))


def bounded(main: Coroutine[Any, Any, T]) -> T:
    async def go() -> T:
        async with asyncio.timeout(60):
            return await main

    return run(go())


async def share(server: ScriptedServer, load: Load, which: Share | None = None) -> Result:
    return await send_share(server.endpoint, load, WORDS, which or Share(), CLOCK())


class Steps:
    """A clock that stands until the server moves it on, and says when it was read."""

    def __init__(self) -> None:
        self.now_s = 50.0
        self.was_read = asyncio.Event()

    def __call__(self) -> float:
        self.was_read.set()
        return self.now_s

    async def move(self, seconds: float) -> None:
        self.now_s += seconds
        self.was_read.clear()


def test_tokens_at_known_instants_are_measured_exactly() -> None:
    """Of a whole exchange over a socket: the clock moves only when all that was said has been read."""

    async def main() -> None:
        clock = Steps()

        async def answer(asked: Asked) -> None:
            await asked.begin()
            clock.was_read.clear()
            await asked.say("")
            await clock.was_read.wait()
            for gap_s in (0.4, 0.05, 0.06, 0.07):
                await clock.move(gap_s)
                await asked.say("x")
                await clock.was_read.wait()
            await clock.move(0.02)
            await asked.say(finish="length")
            await clock.was_read.wait()
            await clock.move(7.0)
            await asked.usage(7, 4)
            await asked.done()

        load = Load(model="scripted", output_len=4, num_requests=1)
        async with scripted_server(answer) as server:
            client = Client(server.endpoint)
            outcome = await Sender(client, load, WORDS, clock).send(next(plan(load)), 50.0)
            await client.close()
        assert outcome.fault == ""
        assert ttft_s(outcome) == pytest.approx(0.4)
        assert outcome.gaps_s == pytest.approx([0.05, 0.06, 0.07])
        assert e2el_s(outcome) == pytest.approx(0.6)
        assert tpot_s(outcome) == pytest.approx(0.2 / 3)

    bounded(main())


def test_all_are_sent_and_counted() -> None:
    async def main() -> None:
        async with scripted_server(lambda asked: say_all(asked, "a", "b")) as server:
            result = await share(server, LOAD)
        assert sorted(each.number for each in result.outcomes) == list(range(6))
        assert {(each.fault, each.input_tokens, each.output_tokens) for each in result.outcomes} == {
            ("", 7, 2)
        }
        assert result.health.wall_s > 0
        assert all(len(asked.body["prompt"]) == 7 for asked in server.asked)

    bounded(main())


def test_shares_make_a_whole() -> None:
    async def main() -> None:
        async with scripted_server(lambda asked: say_all(asked, "a", "b")) as server:
            results = [await share(server, LOAD, Share(index, 4)) for index in range(4)]
        numbers = [each.number for result in results for each in result.outcomes]
        assert sorted(numbers) == list(range(6))
        prompts = [tuple(asked.body["prompt"]) for asked in server.asked]
        assert len(set(prompts)) == 6

    bounded(main())


@pytest.mark.parametrize("concurrency", [1, 3])
def test_no_more_than_so_many_at_a_time(concurrency: int) -> None:
    async def main() -> None:
        running, most = 0, 0

        async def answer(asked: Asked) -> None:
            nonlocal running, most
            running += 1
            most = max(most, running)
            if most < concurrency:
                await full.wait()
            full.set()
            running -= 1
            await say_all(asked, "a", "b")

        full = asyncio.Event()
        load = Load(endpoint=COMPLETIONS, input_len=7, output_len=2, num_requests=8, concurrency=concurrency)
        async with scripted_server(answer) as server:
            result = await share(server, load)
        assert most == concurrency
        assert len(result.outcomes) == 8
        assert server.num_connections == concurrency, "connections are kept"

    bounded(main())


def test_nothing_is_sent_behind_the_duration() -> None:
    """At 1,000 requests/s for 0.05 s: 50, however slow this machine is."""

    async def main() -> None:
        load = Load(
            endpoint=COMPLETIONS, input_len=7, output_len=2, rate=1000.0, arrival="constant", duration_s=0.05
        )
        async with scripted_server(lambda asked: say_all(asked, "a", "b")) as server:
            result = await share(server, load)
        assert len(result.outcomes) == 50
        dues = [each.due_s for each in sorted(result.outcomes, key=lambda each: each.number)]
        assert [later - dues[0] for later in dues] == pytest.approx([n / 1000 for n in range(len(dues))])

    bounded(main())


def test_who_waits_for_a_place_is_held_and_not_late() -> None:
    async def main() -> None:
        load = Load(
            endpoint=COMPLETIONS,
            input_len=7,
            output_len=2,
            rate=1e6,
            arrival="constant",
            num_requests=3,
            concurrency=1,
        )
        first_came, release = asyncio.Event(), asyncio.Event()

        async def answer(asked: Asked) -> None:
            first_came.set()
            await release.wait()
            await say_all(asked, "a", "b")

        async with scripted_server(answer) as server:
            sending = asyncio.create_task(share(server, load))
            await first_came.wait()
            held_since = CLOCK()
            asyncio.get_running_loop().call_later(0.05, release.set)
            await release.wait()
            held_s = CLOCK() - held_since
            first, second, third = sorted((await sending).outcomes, key=lambda each: each.number)
        assert second.held_s >= held_s > first.held_s
        assert second.due_s >= first.due_s + held_s
        assert third.due_s >= second.end_s, "also of one that waits behind one that waits"

    bounded(main())


@pytest.mark.parametrize("kind", ["http 503", "cut off", "no usage", "wrong count", "timeout", "connection"])
def test_failures_by_kind(kind: str) -> None:
    async def main() -> None:
        async def answer(asked: Asked) -> None:
            match kind:
                case "http 503":
                    await asked.reply(503, {"error": {"message": "no engine"}})
                case "cut off":
                    await asked.begin()
                    await asked.say("a")
                    asked.cut()
                case "no usage":
                    await asked.begin()
                    await asked.say("a")
                    await asked.done()
                case "wrong count":
                    await say_all(asked, "a")
                case "timeout":
                    await asyncio.Event().wait()
                case _:
                    asked.cut()

        load = Load(endpoint=COMPLETIONS, input_len=7, output_len=2, num_requests=2, timeout_s=0.2)
        async with scripted_server(answer) as server:
            result = await share(server, load)
            assert [each.fault for each in result.outcomes] == [kind, kind]
            for writer in {asked.writer for asked in server.asked}:
                writer.close()

    bounded(main())
