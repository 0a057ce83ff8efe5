"""Whatever the network does to the events of an engine without snapshots, nothing is held to be there that is
not, and all that its replay still tells of is known."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from microserve.services.links.feed_state import BACKOFF_MAX_S, Apply, Replace
from microserve.services.links.follow_state import MAX_FAILURES, AskReplay, FollowState, MarkedBatch, Step
from tests.support.examples import examples
from tests.support.index.block_changes import Change, Changes, apply_changes

pytestmark = pytest.mark.slow

CHANGES = st.lists(
    st.tuples(st.sampled_from(["store", "store", "remove", "clear"]), st.integers(0, 5)),
    min_size=1,
    max_size=3,
).map(tuple)
RING = 4


class Engine:
    """The publisher's truth, life after life; a mark is unique as a wall clock makes it."""

    def __init__(self) -> None:
        self.num_batches = 0
        self.restart()

    def restart(self) -> None:
        self.ring: list[MarkedBatch[Changes]] = []
        self.next_seq = 0
        self.held: set[int] = set()

    def publish(self, changes: Changes) -> MarkedBatch[Changes]:
        self.num_batches += 1
        batch = MarkedBatch(self.next_seq, self.num_batches.to_bytes(8, "big"), changes)
        self.next_seq += 1
        self.ring = [*self.ring, batch][-RING:]
        apply_changes(self.held, changes)
        return batch

    def replay(self, start_seq: int) -> list[MarkedBatch[Changes]]:
        return [batch for batch in self.ring if batch.seq >= start_seq]

    def told_from_the_ring(self) -> set[int]:
        """What a reader knows that has heard of these batches alone."""
        held: set[int] = set()
        for batch in self.ring:
            apply_changes(held, batch.events)
        return held


class FollowMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.engine = Engine()
        self.state: FollowState[Changes] = FollowState(())
        self.now = 0.0
        self.held: set[int] = set()
        self.asks: list[AskReplay] = []
        self.answers: list[tuple[int, list[MarkedBatch[Changes]]]] = []
        """To questions that have left."""
        self.air: list[MarkedBatch[Changes]] = []
        self.obey(self.state.start(self.now))

    def obey(self, steps: list[Step[Changes]]) -> None:
        for step in steps:
            match step:
                case Apply(changes):
                    apply_changes(self.held, changes)
                case Replace(_, changes):
                    self.held.clear()
                    apply_changes(self.held, changes)
                case AskReplay():
                    self.asks.append(step)

    @rule(changes=CHANGES, is_lost=st.booleans())
    def publish(self, changes: Changes, is_lost: bool) -> None:
        batch = self.engine.publish(changes)
        if not is_lost:
            self.air.append(batch)

    @precondition(lambda self: self.air)
    @rule()
    def deliver(self) -> None:
        self.obey(self.state.receive(self.air.pop(0), self.now))

    @precondition(lambda self: self.asks)
    @rule()
    def ask(self) -> None:
        """The socket of the events is as far as the engine is, or behind it: never ahead of the answer."""
        ask = self.asks.pop()
        self.now += ask.delay_s
        self.state.asking(ask.ticket)
        self.answers.append((ask.ticket, self.engine.replay(ask.start_seq)))

    @precondition(lambda self: self.answers)
    @rule(is_lost=st.booleans())
    def answer(self, is_lost: bool) -> None:
        ticket, batches = self.answers.pop()
        if is_lost:
            self.obey(self.state.replay_failed(ticket, self.now))
        else:
            self.obey(self.state.replayed(ticket, batches, self.now))

    @rule()
    def poll(self) -> None:
        self.now += BACKOFF_MAX_S + 1
        self.obey(self.state.poll(self.now))

    @rule()
    def restart(self) -> None:
        """Connections end, and what was under way by them has come or is lost."""
        self.engine.restart()
        self.air.clear()
        self.obey(self.state.lost(self.now))
        for ticket, _ in self.answers:
            self.obey(self.state.replay_failed(ticket, self.now))
        self.answers.clear()

    @rule()
    def settle(self) -> None:
        """Nothing is lost for a while: then the reader knows what is there."""
        before_settling = self.state.next_seq
        anchored = self.state._anchor
        for _ in range(8):
            while self.asks or self.answers:
                if self.asks:
                    self.ask()
                self.answer(is_lost=False)
            while self.air:
                self.deliver()
            self.poll()
        assert self.state.live
        assert self.state.next_seq == self.engine.next_seq
        assert self.held <= self.engine.held
        assert self.held >= self.engine.told_from_the_ring() & self.engine.held
        if anchored is None and before_settling == 0 and self.engine.next_seq <= RING:
            assert self.held == self.engine.held

    @invariant()
    def holds(self) -> None:
        self.state.check_integrity()
        assert len(self.asks) + len(self.answers) <= 1


FollowMachine.TestCase.settings = settings(max_examples=examples(200), stateful_step_count=40, deadline=None)
TestFollow = FollowMachine.TestCase


def batch(seq: int, mark: bytes, *changes: Change) -> MarkedBatch[Changes]:
    return MarkedBatch(seq, mark, changes)


def test_a_life_that_has_come_as_far_as_the_one_before_is_known_by_its_bytes() -> None:
    state: FollowState[Changes] = FollowState(())
    [ask] = state.start(0.0)
    assert isinstance(ask, AskReplay) and ask.start_seq == 0
    old, new = batch(0, b"old", ("store", 1)), batch(0, b"new", ("store", 2))
    assert state.replayed(ask.ticket, [old], 0.0) == [Replace(0, ()), Apply(old.events)]

    [ask] = state.poll(9.0)
    assert isinstance(ask, AskReplay) and ask.start_seq == 0
    forget, ask = state.replayed(ask.ticket, [new], 9.0)
    assert forget == Replace(0, ()) and isinstance(ask, AskReplay)
    assert state.replayed(ask.ticket, [new], 9.0) == [Replace(0, ()), Apply(new.events)]


def test_who_does_not_answer_holds_nothing_that_is_known() -> None:
    state: FollowState[Changes] = FollowState(())
    [ask] = state.start(0.0)
    assert isinstance(ask, AskReplay)
    state.replayed(ask.ticket, [batch(0, b"a", ("store", 1))], 0.0)
    steps = state.lost(1.0)
    for number in range(1, MAX_FAILURES + 1):
        ask = steps[-1]
        assert isinstance(ask, AskReplay)
        steps = state.replay_failed(ask.ticket, 1.0)
        assert (Replace(0, ()) in steps) == (number == MAX_FAILURES)


def test_without_a_replay_a_number_that_is_not_the_next_one_costs_what_was_known() -> None:
    state: FollowState[Changes] = FollowState((), is_blind=True)
    assert state.start(0.0) == state.poll(1.0) == state.lost(2.0) == []
    first, next_one, later = (batch(seq, bytes([seq]), ("store", seq)) for seq in (7, 8, 10))
    assert state.receive(first, 0.0) == [Replace(0, ()), Apply(first.events)]
    assert state.receive(next_one, 0.0) == [Apply(next_one.events)]
    assert state.receive(next_one, 0.0) == []
    assert state.receive(later, 0.0) == [Replace(0, ()), Apply(later.events)]
    anew = batch(0, b"new", ("store", 5))
    assert state.receive(anew, 0.0) == [Replace(0, ()), Apply(anew.events)]
    assert (state.counters.gaps, state.counters.duplicates) == (2, 1)
