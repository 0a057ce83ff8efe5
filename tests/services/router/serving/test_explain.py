"""A router says why a request went where it went: what was picked, by what, after which failure."""

from __future__ import annotations

import pytest
import structlog

from microserve.protocol import log
from microserve.protocol.errors import StrategyError
from microserve.protocol.messages.strategy.control import ControlState, EngineLabels
from microserve.protocol.messages.strategy.decisions import (
    MAX_NOTE_CHARS,
    MAX_NOTE_VALUES,
    Explanation,
    Question,
)
from microserve.services.router.authoring import scorer
from microserve.services.router.authoring.action.generating import Chunks
from microserve.services.router.authoring.mesh import Mesh
from microserve.services.router.request.request import Request
from tests.support.router.router_world import World, eventually, in_loop, router_world, serve_with, start_with

SECRET = 977
"""A token that would show."""
PROMPT = [SECRET] * 40
LABELS = {"d": ["decode"], "p": ["prefill"], "q": ["prefill"]}


async def split(mesh: Mesh, request: Request) -> Chunks:
    decode = mesh.pick("decode", request, cost=lambda engine: 7.5)
    prefill = mesh.pick("prefill", request, exclude=[decode], scorers={scorer.load: 2.0})
    mesh.note("split", at=30, of=request.num_tokens, why="cold")
    grant = await decode.prep_recv(request, end=30)
    prefill.remote_send(request, grant, end=30)
    yield decode.start_generate(request, begin=30, grant=grant)


def explained(world: World, request_id: str) -> Explanation:
    [found], num_left_out = world.router.serving.explain(request_id)
    assert num_left_out == 0
    return found


@in_loop
async def test_every_pick_is_told_with_what_it_was_chosen_from() -> None:
    async with router_world("d", "p", "q", labels=LABELS) as world:
        answer = await serve_with(world, split, PROMPT, request_id="client.0a0a0a0a-0", tenant="t")
        found = explained(world, "client")
        assert (found.request_id, found.reason, found.code) == ("client.0a0a0a0a-0", "length", "")
        assert (found.num_prompt_tokens, found.num_output_tokens, found.tenant) == (40, 4, True)
        [attempt] = found.attempts
        decode, prefill = attempt.picks
        assert (decode.label, decode.by, decode.candidates, decode.costs) == ("decode", "cost", ["d"], [7.5])
        assert (prefill.label, prefill.by, prefill.excluded) == ("prefill", "scorers", ["d"])
        assert sorted(prefill.candidates) == ["p", "q"] and prefill.chosen in prefill.candidates
        assert [(each.name, each.weight, len(each.scores)) for each in prefill.scored] == [("load", 2.0, 2)]
        assert {each.engine_id: each.labels for each in attempt.engines} == LABELS
        [note] = attempt.notes
        assert (note.text, note.values) == ("split", {"at": 30, "of": 40, "why": "cold"})
        [send] = attempt.sends
        assert (send.source, send.target, send.begin, send.end) == (prefill.chosen, "d", 0, 30)
        assert (attempt.engine_id, attempt.begin) == ("d", 30)
        assert answer.result.why == f"decode: d of 1 by cost; prefill: {prefill.chosen} of 2 by scorers"


@in_loop
async def test_a_record_holds_no_prompt_and_no_value_of_an_attribute() -> None:
    async with router_world("d", "p", "q", labels=LABELS) as world:
        attributes = {"user": "alice@example.org"}
        await serve_with(world, split, PROMPT, request_id="r", attributes=attributes, tenant="acme")
        [record] = world.router.serving.records
        assert b"user" in record and b"tenant" in record
        assert b"alice" not in record and b"acme" not in record
        for encoded in (SECRET.to_bytes(4, "little"), b"\xcd" + SECRET.to_bytes(2)):  # raw, and msgpack's
            assert 2 * encoded not in record


@in_loop
async def test_each_attempt_is_told_and_one_that_runs_is_told_too() -> None:
    async def mistaken(mesh: Mesh, request: Request) -> Chunks:
        mesh.pick(None, request)
        raise ValueError("no")
        yield

    async with router_world("a", "b") as world:
        answer = await serve_with(world, mistaken, PROMPT, request_id="r")
        first, second = explained(world, "r").attempts
        assert (len(first.picks), first.engine_id) == (1, "")
        assert (second.strategy, second.engine_id) == ("data_parallel", second.picks[0].chosen)
        assert answer.result.why == f"attempt 2: any: {second.engine_id} of 2 by load"
        for engine in world.engines.values():
            engine.paused.add("decode")
        running = world.gateway.start(PROMPT, request_id="still")
        await eventually(lambda: len(world.router.serving) == 1, "it is live")
        await eventually(lambda: explained(world, "still").attempts, "its strategy runs")
        assert (explained(world, "still").reason, explained(world, "still").age_s) == ("", 0.0)
        world.gateway.cancel(running)


@in_loop
async def test_a_question_of_the_index_is_answered() -> None:
    async with router_world("a") as world:
        await serve_with(world, split, PROMPT, request_id="r")
        await eventually(lambda: world.index.last_watch is not None, "the router watches")
        assert world.index.last_watch is not None and world.index.last_watch.answers
        world.index.ask(Question(7, "r"))
        await eventually(lambda: world.index.answers, "the answer")
        [answer] = world.index.answers
        assert (answer.question_id, answer.router_id) == (7, world.router.identity.router_id)
        assert (answer.num_kept, answer.found[0].request_id) == (1, "r")


@in_loop
async def test_where_nothing_is_recorded_notes_are_fine_and_nothing_is_told() -> None:
    async with router_world("a", record_requests=0) as world:
        answer = await serve_with(world, split, PROMPT, request_id="r")
        assert answer.result.why == ""
        assert world.router.serving.explain("r") == ([], 0)


@in_loop
async def test_notes_are_cut_and_what_is_no_value_is_a_mistake_at_once() -> None:
    async def wordy(mesh: Mesh, request: Request) -> Chunks:
        mesh.note("x" * 9_000, **{f"v{number}": "y" * 9_000 for number in range(20)})
        with pytest.raises(StrategyError, match="prompt is list, not a number or a text"):
            mesh.note("all of it", prompt=list(request.tokens))  # type: ignore[arg-type]
        yield mesh.pick(None, request).start_generate(request)

    async with router_world("a") as world:
        await serve_with(world, wordy, PROMPT, request_id="r")
        [note] = explained(world, "r").attempts[0].notes
        assert len(note.text) == MAX_NOTE_CHARS
        assert {len(value) for value in note.values.values() if isinstance(value, str)} == {MAX_NOTE_CHARS}
        assert len(note.values) == MAX_NOTE_VALUES


@in_loop
async def test_the_record_changes_no_choice() -> None:
    """Equals are drawn by the same lots."""
    chosen = []
    for record_requests in (0, 10):
        async with router_world("a", "b", "c", record_requests=record_requests) as world:
            name = start_with(world, split)
            answers = [await world.gateway.generate(PROMPT, strategy=name) for _ in range(6)]
            chosen.append([answer.result.engines for answer in answers])
    assert chosen[0] == chosen[1]


@in_loop
async def test_an_endless_loop_of_notes_is_broken_off_as_any() -> None:
    """The bound holds meanwhile; test_every_call.py has the time."""

    async def many(mesh: Mesh, request: Request) -> Chunks:
        for number in range(5_000):
            mesh.note("again", number=number)
            mesh.pick(None, request)
        yield mesh.pick(None, request).start_generate(request)

    async with router_world("a", "b") as world:
        with structlog.testing.capture_logs() as logs:
            await serve_with(world, many, PROMPT, request_id="r")
        assert not [each for each in logs if each["event"] == log.STRATEGY_FAILED]
        [attempt] = explained(world, "r").attempts
        assert (attempt.num_notes, attempt.num_picks) == (5_000, 5_001)
        assert world.router.serving.records.nbytes < 64 << 10


@in_loop
async def test_requests_that_saw_the_same_share_what_they_saw_and_new_labels_are_seen_at_once() -> None:
    async with router_world("d", "p", "q", labels=LABELS) as world:
        for engine in world.engines.values():
            engine.mute_heartbeats = True
        await world.beats(2)
        name = start_with(world, split)
        for number in range(2):
            await world.gateway.generate(PROMPT, strategy=name, request_id=f"r{number}.0a0a0a0a-0")
        world.router.take_control(ControlState(1, [], [EngineLabels("p", ["decode"])]))
        await world.gateway.generate(PROMPT, strategy=name, request_id="r2.0a0a0a0a-0")
        assert len(world.router.serving.records._kept) == 2, "what the first two saw, and the third"
        seen = [
            {each.engine_id: each.labels for each in explained(world, f"r{number}").attempts[0].engines}
            for number in range(3)
        ]
        assert seen == [LABELS, LABELS, LABELS | {"p": ["decode"]}]
