"""``microserve explain``: asks by a real index, prints what routers say, and says who said nothing."""

from __future__ import annotations

import asyncio
import json

import msgspec
import pytest
from click.testing import CliRunner, Result

from microserve.protocol.messages.index import Members, Watch
from microserve.protocol.messages.strategy.decisions import Answer, Explained, Question
from microserve.services.command.explain.table import lines
from microserve.services.command.main import main
from microserve.services.router.rollout.replay import Replayed
from tests.support.index.index_service import Index, Peer, with_index
from tests.support.index.index_world import World
from tests.support.index.question_samples import ATTEMPT, EXPLANATION, PICK


def run(*words: str) -> Result:
    return CliRunner().invoke(main, ["explain", *words])


@pytest.mark.parametrize(
    "words",
    [[], ["r", "--set", "a=1"], ["r", "--strategy"], ["r", "-o", "xml"], ["r", "--config", "absent.toml"]],
)
def test_wrong_flags_exit_2(words: list[str]) -> None:
    assert run(*words).exit_code == 2


class Router:
    """Watches as a router does, and answers questions with what it was given."""

    def __init__(self, peer: Peer, name: str, found: list) -> None:  # type: ignore[type-arg]
        self.peer = peer
        self.asked: list[str] = []
        self._name, self._found = name, found
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        seen = 0
        while True:
            self.peer.send(Watch(self._name, 0, answers=True))
            for reply in self.peer.replies[seen:]:
                if isinstance(reply, Question):
                    self.asked.append(reply.request_id)
                    self.peer.send(Answer(reply.question_id, self._name, self._found, 0, 5))
            seen = len(self.peer.replies)
            await asyncio.sleep(0.01)


def test_every_router_is_asked_and_what_it_says_is_printed() -> None:
    async def test(world: World, index: Index) -> None:
        async def command(*words: str) -> Result:
            return await asyncio.to_thread(run, *words, "--index", index.address)

        done = await command("r1")
        assert (done.exit_code, "no router watches this index" in done.output) == (1, True)
        knows, knows_not = Router(index.peer(), "ra", [EXPLANATION]), Router(index.peer(), "rb", [])
        old = index.peer()
        await old.ask(Members, Watch("old", 0))
        await world.until(lambda: bool(knows.peer.replies and knows_not.peer.replies))
        try:
            done = await command("r1")
            assert done.exit_code == 0, done.output
            assert "r1.0a0a0a0a-0  on ra  balanced version 3  ended 6.5 s ago: cache_full" in done.output
            assert "old: cannot be asked" in done.output
            assert knows.asked == knows_not.asked == ["r1"]
            assert not [reply for reply in old.replies if isinstance(reply, Question)]
            [told] = json.loads((await command("r1", "-o", "json")).output.rpartition("Error")[0])
            assert (told["router_id"], told["attempts"][0]["picks"][0]["chosen"]) == ("ra", "e1")
            knows._found = []
            done = await command("r2")
            assert done.exit_code == 1
            assert "no router remembers r2 (ra has 5 requests, rb has 5 requests;" in done.output
        finally:
            knows.task.cancel()
            knows_not.task.cancel()

    with_index(test)


def told(replays: dict[str, list[Replayed]] | None = None, **fields: object) -> str:
    pick = msgspec.structs.replace(PICK, **fields)
    attempt = msgspec.structs.replace(ATTEMPT, picks=[pick])
    found = msgspec.structs.replace(EXPLANATION, attempts=[attempt], num_attempts=1)
    return "\n".join(lines(Explained(1, "ra", [found], 0, 5), replays or {}))


def test_a_pick_is_a_table_with_the_reasons_that_narrowed_it() -> None:
    text = told()
    assert "pick decode by cost, drawn at temperature 0.75: e1" in text
    rows = [line.split() for line in text.splitlines()]
    assert ["engine", "cost", "uncached", "sequences", "cached", "load"] in rows
    assert ["e1", "<", "1.5", "6", "8", "16", "3.5*5.5"] in rows
    assert ["e2", "2.5", "7", "9", "0", "4.5*5.5"] in rows
    assert "excluded: e3" in text and "only engines of numerics class n1" in text
    assert "note t v=2.5" in text
    assert "sends [16, 30) from e2 to e1" in text
    assert "generates on e1 from 30 of 40 tokens, the first token comes from the sender" in text


def test_who_could_not_do_it_is_said() -> None:
    assert "cannot" not in told()  # it is a candidate
    assert "cannot remote_send, and is no candidate: e1" in told(candidates=["e2"], costs=[1.0], scored=[])


def test_what_nobody_knows_of_engines_is_said_of_a_replay() -> None:
    made = Replayed("mine", 0, engine_id="e1", unknown=["e1", "e2"])
    assert "nothing says what e1, e2 can do: taken as able to do everything" in told(
        {EXPLANATION.request_id: [made]}
    )


def test_what_could_not_narrow_it_is_said() -> None:
    assert "no engine has the label gone" in told(label="gone")
    assert "excluded: e1; it yields, for nobody else is left" in told(excluded=["e1"])
    assert "2 of 2 cost the same; between them by load" in told(costs=[1.0, 1.0], temperature=0.0)
    assert "2 of 2 cost the same; between them by lot" in told(
        costs=[1.0, 1.0], temperature=0.0, uncached_tokens=[1, 1], sequences=[2, 2]
    )


def test_another_strategy_stands_below_what_was_done() -> None:
    other = Replayed(
        "auto", 0, choices=["decode: e2 of 2 by cost"], engine_id="e2", ttft_s=0.1, done_ttft_s=0.2
    )
    text = told({EXPLANATION.request_id: [other]})
    assert "auto by what was known then:" in text and "generates on e2 from 0: another engine" in text
    assert "predicted TTFT 100.0 ms, of what was done 200.0 ms" in text
    assert "it broke" in told({EXPLANATION.request_id: [Replayed("auto", 0, "it broke")]})
