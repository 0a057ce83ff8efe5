"""``microserve strategy compare`` and ``show``: what routers say is added, judged and told in lines."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

from canary_traffic import Comparison, Traffic
from click.testing import CliRunner, Result

from microserve.protocol.messages.index import IndexReply, Members, Watch
from microserve.protocol.messages.strategy.control import Change, Changed
from microserve.protocol.messages.strategy.decisions import Answer, Question
from microserve.protocol.messages.strategy.scores import Ramp, Score, Side, Times, Trial
from microserve.services.command.main import main
from tests.support.index.index_service import Index, Peer, with_index
from tests.support.index.index_world import World


async def run(index: Index, *words: str) -> Result:
    return await asyncio.to_thread(
        CliRunner().invoke, main, ["strategy", *words, "--index", index.address], catch_exceptions=False
    )


async def canary(index: Index, **fields: Any) -> None:
    publisher = index.peer()
    await publisher.ask(Changed, Change(1, "a", "publish", "mine", source="old"))
    await publisher.ask(Changed, Change(2, "b", "publish", "mine", source="new", share=0.5, **fields))


def seen(count: int, factor: float, seed: int = 1) -> tuple[Side, Side]:
    """The canary's side and the other."""
    *_, last = Comparison(Traffic(factor=factor), seed).steps(count)
    return last


def trial(sides: tuple[Side, Side], *, share: float = 0.5, is_sticky: bool = False) -> Trial:
    return Trial("mine", 1, 2, share, is_sticky, 100.0, sides[1], sides[0])


def score(version: int, share: str, engine: str = "", side: Side | None = None, num: int = 10) -> Score:
    times = Times(num, -2.0 * num, 4.1 * num, {80: num - 2, 100: 2})
    fields = (num, {"queue_full": 1}, 0, 2, 100 * num, 50 * num, 0, 7 * num)
    return Score("mine", version, share, engine, *fields, times, times, times, 60.0, side)


class Router:
    """Answers for its scoreboard."""

    def __init__(
        self, index: Index, name: str, scores: Sequence[Score], trials: Sequence[Trial] = ()
    ) -> None:
        self.peer: Peer = index.peer()
        self._name, self._scores, self._trials = name, scores, trials
        self._append = self.peer.replies.append
        self.peer.replies = _Hearing(self._heard)

    async def watch(self, version: int) -> None:
        watch = Watch(self._name, version, answers=True, trials=list(self._trials))
        await self.peer.ask(Members, watch)

    def _heard(self, reply: IndexReply) -> None:
        if isinstance(reply, Question):
            assert reply.scores_of is not None
            found = [each for each in self._scores if reply.scores_of in ("", each.strategy)]
            self.peer.send(Answer(reply.question_id, self._name, [], 0, 9, found))


class _Hearing(list[IndexReply]):
    def __init__(self, hear: Any) -> None:
        super().__init__()
        self._hear = hear

    def append(self, reply: IndexReply) -> None:
        super().append(reply)
        self._hear(reply)


def test_two_routers_together_say_what_neither_can() -> None:
    async def test(world: World, index: Index) -> None:
        await canary(index)
        for number in range(2):
            await Router(index, f"r{number}", [], [trial(seen(200, 1.25, number))]).watch(2)
        done = await run(index, "compare", "mine")
        assert done.exit_code == 0, done.output
        lines = done.output.splitlines()
        assert "mine: canary 2 (0.5 of the requests) beside stable 1" in lines[0]
        assert "drawn by lot" in lines[0]
        [ttft] = [line for line in lines if line.split()[0] == "TTFT"]
        assert ttft.split()[1] == "worse"
        assert 1.1 < float(ttft.split()[2]) < 1.4
        [failures] = [line for line in lines if line.split()[0] == "failures"]
        assert "none failed" in failures
        swapped = await run(index, "compare", "mine/1", "mine/2", "-o", "json")
        measures = json.loads(swapped.output)["measures"]
        assert measures["TTFT"]["verdict"] == "better"
        assert measures["TTFT"]["low"] < 0.8 < measures["TTFT"]["high"]
        assert measures["TPOT"]["verdict"] == "not yet"

    with_index(test)


def test_what_cannot_be_said_yet_says_how_much_more_it_takes() -> None:
    async def test(world: World, index: Index) -> None:
        await canary(index)
        await Router(index, "r", [], [trial(seen(60, 1.15), is_sticky=True)]).watch(2)
        done = await run(index, "compare", "mine")
        [ttft] = [line for line in done.output.splitlines() if line.split()[0] == "TTFT"]
        assert "not yet" in ttft and "requests more" in ttft and "at this rate" in ttft
        assert "hint" in done.output, "of a sticky canary"

    with_index(test)


def test_two_versions_that_clients_have_chosen_are_compared_with_a_warning() -> None:
    async def test(world: World, index: Index) -> None:
        ours, theirs = seen(300, 1.3)
        scores = [score(0, "stable", side=theirs), score(7, "stable", side=ours), score(7, "stable", "e1")]
        await Router(index, "r", scores).watch(0)
        done = await run(index, "compare", "mine/7", "mine")
        assert done.exit_code == 0, done.output
        assert "not drawn by lot" in done.output
        [ttft] = [line for line in done.output.splitlines() if line.split()[0] == "TTFT"]
        assert ttft.split()[1] == "worse"
        missing = await run(index, "compare", "mine/8", "mine")
        assert missing.exit_code == 1
        assert "mine/0, mine/7" in missing.output
        assert (await run(index, "compare", "mine")).exit_code == 1, "it has no canary"
        assert (await run(index, "compare", "mine/x")).exit_code == 2

    with_index(test)


def test_show_has_the_scoreboard_of_all_routers_and_how_far_a_ramp_is() -> None:
    async def test(world: World, index: Index) -> None:
        await canary(index, ramp=Ramp([0.5, 1.0], every_s=60.0, min_requests=20))
        scores = [score(1, "stable", num=30), score(1, "stable", "e1", num=20), score(2, "canary")]
        for name in ("r1", "r2"):
            await Router(index, name, scores, [trial(seen(10, 1.0))]).watch(2)
        await asyncio.sleep(0)
        done = await run(index, "show", "mine")
        assert done.exit_code == 0, done.output
        lines = [" ".join(line.split()) for line in done.output.splitlines()]
        assert any(line.startswith("ramp 50%, 100% each 60 s and 20 requests") for line in lines)
        [stable] = [line for line in lines if line.startswith("stable 1 ") and "requests" in line]
        assert "60 requests, 2 failed (2 queue_full), 4 moves, cached 50%" in stable
        [engine] = [line for line in lines if line.startswith("e1 ")]
        assert "40 requests" in engine
        assert any(line.startswith("TTFT mean 135 ms (95 %:") and "p90" in line for line in lines)
        assert any(line.startswith("canary 2 20 requests") for line in lines)

    with_index(test)
