"""Tokens that wait for credit: merged, in order, in messages that fit the wire, against a naive model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from microserve.protocol.bus import queue as queue_module
from microserve.protocol.bus.codec import ENGINE_REPLY, MAX_MESSAGE_NBYTES, ROUTER_REPLY
from microserve.protocol.bus.queue import MAX_STREAM_TOKENS, StreamQueue
from microserve.protocol.messages.engine import Delta, Deltas, Finished, Timings, TokenLogprob, Usage
from microserve.protocol.messages.request.prompt_logprobs import PromptLogprob, PromptLogprobs, packed
from microserve.protocol.messages.router import Ended, Output, Phases, Stream
from tests.support.examples import examples

FINISHED = Finished("length", Usage(), Timings())
ENDED = Ended("length", Usage(), Phases(), "s", [])
KINDS: list[tuple[Any, Any]] = [(Delta, FINISHED), (Output, ENDED)]
"""What an engine queues for a router, and a router for a gateway."""


def end_of(item: Delta | Output) -> object:
    return item.finished if isinstance(item, Delta) else item.ended


ROOM = 40
"""Tokens of one message here: what is split is split in the same way as at 16,384."""
PROMPT_NBYTES = 100
"""Likewise, of rows of prompts: each has 16."""


def rows_from(begin: int, count: int) -> PromptLogprobs:
    """Rows that say which position they are of."""
    return packed(begin, 1, [PromptLogprob(-1.0, 1, ((p, -0.5),)) for p in range(begin, begin + count)])


@dataclass
class Life:
    """One stream of one request: what was added to it and what was taken of it."""

    added: list[int] = field(default_factory=list)
    taken: list[int] = field(default_factory=list)
    num_rows: int = 0
    """Of its prompt, added; no token comes before the last of them."""
    rows_taken: list[int] = field(default_factory=list)
    """Their positions."""
    has_end: bool = False
    is_over: bool = False


class QueueMachine(RuleBasedStateMachine):
    """Every token comes out once, in order, at its offset; the end with the last; one message a credit.

    The model keeps no queue: only what each stream was given and has brought."""

    kind = 0

    def __init__(self) -> None:
        super().__init__()
        self.item, self.end = KINDS[self.kind]
        self.room = mock.patch.object(queue_module, "MAX_STREAM_TOKENS", ROOM)
        self.prompt_room = mock.patch.object(queue_module, "MAX_STREAM_PROMPT_NBYTES", PROMPT_NBYTES)
        self.room.start()
        self.prompt_room.start()
        self.queue: StreamQueue[Any, Any] = StreamQueue(self.item, 0)
        self.lives: dict[str, Life] = {}
        self.credit = 0
        self.next_token = 0
        self.given: list[tuple[Any, list[int]]] = []
        """Items that were handed over whole, and their tokens."""

    names = st.sampled_from("abc")

    @rule(name=names, count=st.sampled_from([0, 1, 1, 2, 7, ROOM - 1, ROOM + 3]), is_whole=st.booleans())
    def add(self, name: str, count: int, is_whole: bool) -> None:
        life = self.lives.setdefault(name, Life())
        if life.has_end:
            return
        tokens = list(range(self.next_token, self.next_token + count))
        self.next_token += count
        logprobs = [TokenLogprob(-float(token)) for token in tokens]
        item = self.item(name, len(life.added), [*tokens], [*logprobs]) if is_whole else None
        if item is None:
            self.queue.add(name, len(life.added), tokens, logprobs)
        else:
            self.queue.add(name, len(life.added), item.token_ids, item.logprobs, None, item)
            self.given.append((item, [*tokens]))
        life.added += tokens

    @rule(name=names, count=st.sampled_from([1, 3, 20]), is_whole=st.booleans())
    def add_rows(self, name: str, count: int, is_whole: bool) -> None:
        life = self.lives.setdefault(name, Life())
        if life.has_end or life.added:
            return
        rows = rows_from(1 + life.num_rows, count)
        life.num_rows += count
        item = self.item(name, 0, [], [], prompt=rows) if is_whole else None
        self.queue.add(name, 0, [], [], None, item, prompt=rows)

    @rule(name=names)
    def add_end(self, name: str) -> None:
        life = self.lives.setdefault(name, Life())
        if not life.has_end:
            life.has_end = True
            self.queue.add(name, len(life.added), [], [], self.end)

    @rule(name=names)
    def begin_again(self, name: str) -> None:
        """The request's next life: what waits of the last is nobody's."""
        self.queue.drop(name)
        self.lives.pop(name, None)

    @rule(messages=st.integers(-1, 3))
    def grant(self, messages: int) -> None:
        self.queue.window.grant(messages)
        self.credit += max(0, messages)

    @precondition(lambda self: self.credit == 0)
    @rule()
    def take_without_credit(self) -> None:
        assert self.queue.take() == []

    @rule()
    def take(self) -> None:
        items = self.queue.take()
        if not items:
            return
        self.credit -= 1
        assert self.credit >= 0
        assert len({item.request_id for item in items}) == len(items), "merged"
        assert sum(len(item.token_ids) for item in items) <= ROOM
        assert sum(len(item.prompt.rows) for item in items if item.prompt is not None) <= PROMPT_NBYTES
        for item in items:
            life = self.lives[item.request_id]
            assert not life.is_over
            assert item.offset == len(life.taken)
            assert [TokenLogprob(-float(token)) for token in item.token_ids] == item.logprobs
            if item.prompt is not None:
                life.rows_taken += [row.top[0][0] for row in item.prompt]
                assert item.prompt.end == 1 + len(life.rows_taken)
            assert life.rows_taken == list(range(1, 1 + len(life.rows_taken)))
            if item.token_ids or end_of(item) is not None:
                assert len(life.rows_taken) == life.num_rows, "rows come before tokens, or with them"
            life.taken += item.token_ids
            if end_of(item) is not None:
                assert life.taken == life.added, "the end comes with the last token"
                life.is_over = True

    @invariant()
    def nothing_is_invented(self) -> None:
        assert all(life.taken == life.added[: len(life.taken)] for life in self.lives.values())
        waiting = [
            x
            for x in self.lives.values()
            if x.taken != x.added or x.has_end != x.is_over or len(x.rows_taken) != x.num_rows
        ]
        assert len(self.queue) >= len(waiting)
        assert all(item.token_ids == tokens for item, tokens in self.given), (
            "what is handed over is not written to"
        )

    def teardown(self) -> None:
        self.queue.window.grant(1000)
        self.credit += 1000
        while self.queue:
            self.take()
        for life in self.lives.values():
            assert life.taken == life.added and life.is_over == life.has_end, "merging loses nothing"
            assert len(life.rows_taken) == life.num_rows
        self.room.stop()
        self.prompt_room.stop()


class OutputMachine(QueueMachine):
    kind = 1


SETTINGS = settings(max_examples=examples(60), stateful_step_count=30, deadline=None)
QueueMachine.TestCase.settings = OutputMachine.TestCase.settings = SETTINGS
TestDeltas = QueueMachine.TestCase
TestOutputs = OutputMachine.TestCase


def test_without_credit_everything_of_a_request_becomes_one_item() -> None:
    queue: StreamQueue[Output, Ended] = StreamQueue(Output, 0)
    for position in range(50):
        queue.add("r", position, [position], [TokenLogprob(-1.0)])
    queue.add("r", 50, [], [], ENDED)
    assert queue.take() == []
    queue.window.grant(1)

    assert queue.take() == [Output("r", 0, list(range(50)), [TokenLogprob(-1.0)] * 50, ENDED)]


def test_what_waits_is_the_queues_own() -> None:
    queue: StreamQueue[Delta, Finished] = StreamQueue(Delta, 1)
    tokens = [1]
    queue.add("r", 0, tokens, [])
    queue.add("r", 1, [2], [])

    assert tokens == [1]
    assert queue.take() == [Delta("r", 0, [1, 2], [])]


def test_behind_an_end_comes_the_next_life() -> None:
    queue: StreamQueue[Delta, Finished] = StreamQueue(Delta, 1)
    queue.add("r", 0, [1, 2], [], FINISHED)
    queue.add("r", 0, [7], [])

    assert queue.take() == [Delta("r", 0, [7], [])]


@pytest.mark.parametrize("kind", KINDS, ids=["deltas", "outputs"])
def test_a_message_fits_the_wire_however_long_the_wait(kind: tuple[Any, Any]) -> None:
    item, end = kind
    queue: StreamQueue[Any, Any] = StreamQueue(item, 10)
    count = 2 * MAX_STREAM_TOKENS + 10
    logprob = TokenLogprob(-123.456, [(2**31, -123.456)] * 20)
    queue.add("r", 0, [2**31] * count, [logprob] * count, end)
    queue.add("q", 0, [1], [], end)
    messages = []
    while items := queue.take():
        messages.append(items)

    assert [len(items) for items in messages] == [1, 1, 2]
    for items in messages:
        frames = ENGINE_REPLY.encode(Deltas(items)) if item is Delta else ROUTER_REPLY.encode(Stream(items))
        assert len(frames[1]) < MAX_MESSAGE_NBYTES
        assert len(msgspec.msgpack.encode(items)) < MAX_MESSAGE_NBYTES
    assert sum(len(each.token_ids) for items in messages for each in items) == count + 1
    assert [end_of(each) is not None for items in messages for each in items] == [False, False, True, True]


def test_rows_of_a_long_prompt_come_in_pieces_with_the_tokens_of_others_in_between() -> None:
    queue: StreamQueue[Delta, Finished] = StreamQueue(Delta, 10)
    count = 3 * queue_module.MAX_STREAM_PROMPT_NBYTES // 16
    queue.add("long", 0, [], [], prompt=rows_from(1, count))
    queue.add("long", 0, [7], [], FINISHED)
    queue.add("short", 0, [8], [])
    first = queue.take()
    queue.add("short", 1, [9], [])
    second = queue.take()

    assert [item.request_id for item in first] == ["long", "short"]
    assert [item.request_id for item in second] == ["long", "short"]
    assert [len(ENGINE_REPLY.encode(Deltas(items))[1]) < (1 << 18) + 1000 for items in (first, second)] == [
        True,
        True,
    ]
    [last] = queue.take()
    assert last.token_ids == [7] and last.finished is not None and last.prompt is not None
    assert last.prompt.end == count + 1
