"""Whatever the network does to an engine's events, the reader ends with the engine's truth."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from microserve.services.links import feed_state
from microserve.services.links.feed_state import (
    BACKOFF_MAX_S,
    MAX_BUFFERED_BATCHES,
    Apply,
    AskSnapshot,
    EventBatch,
    FeedState,
    Instruction,
    Replace,
)
from tests.support.examples import examples
from tests.support.index.block_changes import Changes, apply_changes


class Engine:
    """The publisher's truth, life after life."""

    def __init__(self) -> None:
        self.epoch = 0
        self.history: dict[tuple[int, int], frozenset[int]] = {}
        """(epoch, seq) -> what was held before that batch."""
        self.restart(epoch=1000)

    def restart(self, epoch: int) -> None:
        self.epoch, self.next_seq, self.held = epoch, 0, set[int]()
        self.history[epoch, 0] = frozenset()

    def publish(self, changes: Changes) -> EventBatch[Changes]:
        batch = EventBatch(self.epoch, self.next_seq, changes)
        apply_changes(self.held, changes)
        self.next_seq += 1
        self.history[self.epoch, self.next_seq] = frozenset(self.held)
        return batch

    def snapshot(self) -> EventBatch[Changes]:
        return EventBatch(self.epoch, self.next_seq, tuple(("store", block) for block in sorted(self.held)))


class Reader:
    """Does what the state says."""

    def __init__(self) -> None:
        self.state: FeedState[Changes] = FeedState()
        self.held: set[int] = set()
        self.asks: list[AskSnapshot] = []

    def obey(self, instructions: list[Instruction[Changes]]) -> None:
        for instruction in instructions:
            match instruction:
                case Apply(changes):
                    apply_changes(self.held, changes)
                case Replace(_, changes):
                    self.held.clear()
                    apply_changes(self.held, changes)
                case AskSnapshot():
                    self.asks.append(instruction)


CHANGES = st.lists(
    st.tuples(st.sampled_from(["store", "store", "remove", "clear"]), st.integers(0, 5)), max_size=3
).map(tuple)


class FeedMachine(RuleBasedStateMachine):
    """Network and engine as adversaries; ``teardown`` lets both come to rest and compares."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.engine = Engine()
        self.reader = Reader()
        self.wire: list[EventBatch[Changes]] = []
        self.answer: tuple[int, EventBatch[Changes]] | None = None
        """A snapshot on its way back."""
        self.left: int | None = None
        """Ticket of a question on its way to the engine."""

    @initialize()
    def start(self) -> None:
        self.reader.obey(self.reader.state.start(self.now))

    @rule(changes=CHANGES)
    def publish(self, changes: Changes) -> None:
        self.wire.append(self.engine.publish(changes))

    @rule()
    def restart(self) -> None:
        # Epochs have no order: the next one may be smaller.
        self.engine.restart(epoch=self.engine.epoch * 7919 % 10_007)

    @precondition(lambda self: self.wire)
    @rule(data=st.data(), fate=st.sampled_from(["deliver", "deliver", "deliver", "duplicate", "drop"]))
    def carry(self, data: Any, fate: str) -> None:
        batch = self.wire.pop(data.draw(st.integers(0, len(self.wire) - 1)))
        if fate == "duplicate":
            self.wire.append(batch)
        if fate != "drop":
            self.receive(batch)

    @precondition(lambda self: self.wire)
    @rule()
    def carry_in_order(self) -> None:
        self.receive(self.wire.pop(0))

    def receive(self, batch: EventBatch[Changes]) -> None:
        self.reader.obey(self.reader.state.receive(batch, self.now))

    @precondition(lambda self: self.reader.asks)
    @rule()
    def ask(self) -> None:
        self.left = self.reader.asks.pop(0).ticket
        self.reader.state.asking(self.left)

    @precondition(lambda self: self.left is not None)
    @rule()
    def engine_answers(self) -> None:
        assert self.left is not None
        self.answer, self.left = (self.left, self.engine.snapshot()), None

    @precondition(lambda self: self.answer is not None)
    @rule()
    def answer_arrives(self) -> None:
        assert self.answer is not None
        (ticket, snapshot), self.answer = self.answer, None
        self.reader.obey(self.reader.state.snapshot(ticket, snapshot, self.now))

    @precondition(lambda self: self.left is not None or self.answer is not None)
    @rule()
    def answer_is_lost(self) -> None:
        ticket = self.left if self.answer is None else self.answer[0]
        assert ticket is not None
        self.left = self.answer = None
        self.reader.obey(self.reader.state.snapshot_failed(ticket, self.now))

    @rule(seconds=st.sampled_from([0.01, 0.5, 5.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def live_means_true(self) -> None:
        state = self.reader.state
        if self.reader.state.counters.batches or state.live:
            state.check_integrity()
        if state.live:
            assert state.epoch is not None
            assert self.reader.held == self.engine.history[state.epoch, state.next_seq]
        assert len(self.reader.asks) + (self.left is not None) + (self.answer is not None) <= 1

    def teardown(self) -> None:
        while self.wire:
            self.receive(self.wire.pop())
        for _ in range(5):
            self.receive(self.engine.publish(()))  # the heartbeat
            for _ in range(5):
                if self.reader.asks:
                    self.ask()
                if self.left is not None:
                    self.engine_answers()
                if self.answer is not None:
                    self.answer_arrives()
        state = self.reader.state
        assert state.live
        assert (state.epoch, state.next_seq) == (self.engine.epoch, self.engine.next_seq)
        assert self.reader.held == self.engine.held


FeedMachine.TestCase.settings = settings(max_examples=examples(150), stateful_step_count=60, deadline=None)
TestAnyInterleaving = FeedMachine.TestCase


def live(seq: int = 0, epoch: int = 7) -> FeedState[str]:
    """A state that has its first snapshot."""
    state: FeedState[str] = FeedState()
    [ask] = state.start(0.0)
    assert isinstance(ask, AskSnapshot)
    state.asking(ask.ticket)
    assert state.snapshot(ask.ticket, EventBatch(epoch, seq, "snapshot"), 0.0) == [Replace(epoch, "snapshot")]
    return state


def test_first_snapshot_is_asked_for_at_once() -> None:
    assert FeedState[str]().start(0.0) == [AskSnapshot(1, 0.0)]


def test_batches_are_applied_in_sequence() -> None:
    state = live(seq=4)

    assert state.receive(EventBatch(7, 4, "a"), 1.0) == [Apply("a")]
    assert state.receive(EventBatch(7, 5, "b"), 1.0) == [Apply("b")]


def test_duplicate_is_dropped() -> None:
    state = live(seq=4)
    state.receive(EventBatch(7, 4, "a"), 1.0)

    assert state.receive(EventBatch(7, 4, "a"), 1.0) == []
    assert state.receive(EventBatch(7, 3, "in the snapshot"), 1.0) == []
    assert state.counters.duplicates == 2


def test_gap_is_closed_by_a_snapshot_and_what_came_meanwhile() -> None:
    state = live()

    [ask] = state.receive(EventBatch(7, 2, "c"), 10.0)
    assert isinstance(ask, AskSnapshot)
    assert state.receive(EventBatch(7, 4, "e"), 10.0) == []
    assert state.receive(EventBatch(7, 3, "d"), 10.0) == []
    state.asking(ask.ticket)

    assert state.snapshot(ask.ticket, EventBatch(7, 3, "snapshot"), 10.1) == [
        Replace(7, "snapshot"),
        Apply("d"),
        Apply("e"),
    ]
    assert state.live


def test_snapshot_that_does_not_reach_the_gap_is_asked_for_again() -> None:
    state = live()
    [ask] = state.receive(EventBatch(7, 5, "f"), 10.0)
    assert isinstance(ask, AskSnapshot)

    instructions = state.snapshot(ask.ticket, EventBatch(7, 3, "early"), 10.1)

    assert instructions == [Replace(7, "early"), AskSnapshot(ask.ticket + 1, 0.1)]
    assert not state.live


def test_new_epoch_replaces_the_old_whose_stragglers_are_dropped() -> None:
    state = live(seq=9, epoch=7)
    [ask] = state.receive(EventBatch(3, 0, "first of the new life"), 10.0)
    assert isinstance(ask, AskSnapshot)
    state.asking(ask.ticket)

    state.snapshot(ask.ticket, EventBatch(3, 1, "snapshot"), 10.1)

    assert state.receive(EventBatch(7, 9, "straggler"), 10.2) == []
    assert state.counters.stale == 1
    assert state.counters.epochs == 1
    assert state.receive(EventBatch(3, 1, "next"), 10.3) == [Apply("next")]


def test_answer_of_a_life_that_ended_meanwhile_is_followed_by_another() -> None:
    state = live(epoch=7)
    [ask] = state.receive(EventBatch(7, 5, "gap"), 10.0)
    assert isinstance(ask, AskSnapshot)
    state.asking(ask.ticket)
    state.receive(EventBatch(3, 0, "new life"), 10.1)

    [_, again] = state.snapshot(ask.ticket, EventBatch(7, 6, "old life"), 10.2)
    assert isinstance(again, AskSnapshot)
    state.asking(again.ticket)

    assert state.snapshot(again.ticket, EventBatch(3, 1, "new"), 10.3) == [Replace(3, "new")]


def test_failures_back_off_to_the_limit_and_recover() -> None:
    state: FeedState[str] = FeedState()
    now, delays = 0.0, []
    [ask] = state.start(now)
    for _ in range(8):
        assert isinstance(ask, AskSnapshot)
        delays.append(ask.delay_s)
        now += ask.delay_s
        [ask] = state.snapshot_failed(ask.ticket, now)

    assert delays == [0.0, 0.1, 0.2, 0.4, 0.8, 1.6, BACKOFF_MAX_S, BACKOFF_MAX_S]

    assert isinstance(ask, AskSnapshot)
    now += ask.delay_s
    state.snapshot(ask.ticket, EventBatch(7, 0, "snapshot"), now)
    [ask] = state.receive(EventBatch(7, 3, "gap"), now + 60.0)
    assert isinstance(ask, AskSnapshot)
    assert ask.delay_s == 0.0


def test_answers_to_forgotten_questions_are_ignored() -> None:
    state = live()

    assert state.snapshot(99, EventBatch(7, 50, "unasked"), 1.0) == []
    assert state.snapshot_failed(99, 1.0) == []
    assert state.next_seq == 0


def test_buffer_is_bounded_and_the_loss_repaired() -> None:
    state: FeedState[str] = FeedState()
    [ask] = state.start(0.0)
    assert isinstance(ask, AskSnapshot)
    for seq in range(MAX_BUFFERED_BATCHES + 10):
        state.receive(EventBatch(7, seq, "x"), 0.0)

    assert state.num_buffered == MAX_BUFFERED_BATCHES
    assert state.counters.overflows == 10

    [_, again] = state.snapshot(ask.ticket, EventBatch(7, 5, "before the hole"), 0.0)
    assert isinstance(again, AskSnapshot)
    instructions = state.snapshot(again.ticket, EventBatch(7, MAX_BUFFERED_BATCHES + 8, "after it"), 0.0)
    assert instructions == [Replace(7, "after it"), Apply("x"), Apply("x")]


def test_retired_epochs_are_bounded() -> None:
    state = live(epoch=1)
    for epoch in range(2, 200):
        [ask] = state.receive(EventBatch(epoch, 0, ""), 10.0 * epoch)
        assert isinstance(ask, AskSnapshot)
        state.asking(ask.ticket)
        state.snapshot(ask.ticket, EventBatch(epoch, 1, ""), 10.0 * epoch)

    assert len(state._retired) == feed_state.MAX_RETIRED_EPOCHS
