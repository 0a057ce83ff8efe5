"""Receives against vLLM's own rules, as its scheduler asserts them: a wrong report is the engine's end."""

from __future__ import annotations

from collections import Counter

import hypothesis.strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from microserve.services.engine.vllm.connector.loading import Reports
from microserve.services.engine.vllm.connector.orders import Copy, Release, Watched
from microserve.services.engine.vllm.connector.receives import Receives
from microserve.services.engine.vllm.link import (
    DROP,
    TAKE,
    WAIT,
    Allocated,
    Freed,
    Generate,
    Notice,
    Receive,
    Received,
)

SIZE = 32


class World:
    """A front's words and what it hears, and the two sides of the connector."""

    def __init__(self) -> None:
        self.words: dict[int, int] = {}
        self.started: set[int] = set()
        self.heard: list[Notice] = []
        self.receives = Receives(SIZE, lambda receive: self.words.get(receive, WAIT), self.heard.append)
        self.reports = Reports(lambda receive: self.words.get(receive, WAIT), self.started.__contains__)

    def park(self, request_id: str, receive: int, end: int, num_local: int = 0) -> None:
        assert self.receives.add(request_id, Receive(receive, end), end, range(end)) is None
        num_external, is_async = self.receives.num_external(request_id, num_local)
        assert is_async and num_external == end - num_local
        self.receives.allocated(request_id, list(range(10, 10 + -(-end // SIZE))), num_external)

    def step(self) -> set[str]:
        """A step whose reports are read at once."""
        due = {each.request_id for each in self.reports.due(self.receives.watched())}
        self.receives.reported(due)
        return due


def test_receive_pin_generate() -> None:
    world = World()
    world.park("a", 5, 70, num_local=32)
    world.receives.add_generate("g", Generate(5))
    assert world.heard == [Allocated(5, 32, [11, 12])]
    assert world.receives.num_external("g", 0) == (None, False), "its receive is not here yet"
    assert world.step() == set()

    world.words[5] = TAKE
    assert world.step() == {"a"}
    assert world.heard[1:] == [Received(5)]
    assert world.step() == set(), "reported once"
    assert world.receives.num_external("a", 0) == (0, False), "a preempted one computes what it lost"
    assert world.receives.num_external("g", 64) == (0, False)
    assert world.receives.finished("a"), "its one token came before anybody generated: pinned"
    assert world.receives.releases() == []
    world.receives.allocated("g", [11, 12], 0)
    assert world.receives.releases() == [Release("a", [])]
    assert world.receives.releases() == []
    world.receives.released({"a"})
    assert world.heard[2:] == [Freed(5)]
    assert not world.receives.finished("g")
    assert world.receives.num_held == 0


def test_one_that_is_generated_from_in_the_pass_of_its_promotion_is_not_pinned() -> None:
    world = World()
    world.park("a", 5, 70)
    world.receives.add_generate("g", Generate(5))
    world.words[5] = TAKE
    world.step()
    world.receives.allocated("g", [10, 11], 0)
    assert not world.receives.finished("a")
    assert world.heard[-1] == Freed(5)


def test_what_lies_behind_the_last_whole_block_is_copied_once_and_before_it_is_released() -> None:
    world = World()
    world.park("a", 5, 70, num_local=32)
    world.receives.add_generate("g", Generate(5))
    world.words[5] = TAKE
    world.step()
    tokens = list(range(71))
    assert world.receives.num_external("g", 64, tokens) == (6, False)
    assert world.receives.num_external("g", 64, tokens[:70]) == (0, False), "more than a next row"
    assert world.receives.num_external("g", 64, [*tokens, 8]) == (0, False)
    assert world.receives.num_external("g", 32, tokens) == (0, False), "something is missing before it"
    assert world.receives.num_external("g", 96, [*tokens, *tokens]) == (0, False), "more is there already"
    assert world.receives.num_external("g", 64, [7, *tokens[1:]]) == (0, False), "of another prompt"
    assert world.receives.finished("a")
    assert world.receives.num_external("g", 64, tokens) == (6, False), "pinned"
    world.receives.allocated("g", [10, 11, 50], 6)
    assert world.receives.releases() == [Release("a", [])], (
        "the worker copies first, and reports behind the step"
    )
    assert world.receives.copies() == [Copy(12, 50)]
    assert world.receives.copies() == []


def test_nothing_is_copied_of_whole_blocks_or_of_what_is_let_go() -> None:
    world = World()
    world.park("a", 5, 64)
    world.park("b", 6, 70)
    world.receives.add_generate("ga", Generate(5))
    world.receives.add_generate("gb", Generate(6))
    world.words |= {5: TAKE, 6: TAKE}
    world.step()
    assert world.receives.num_external("ga", 32, range(65)) == (0, False)
    world.words[6] = DROP
    assert world.receives.num_external("gb", 64, range(71)) == (0, False)


def test_it_rests_only_while_all_that_is_parked_waits_for_writers() -> None:
    world = World()
    assert not world.receives.is_resting
    world.park("a", 5, 70)
    world.park("b", 6, 70)
    assert world.receives.is_resting
    world.words[6] = TAKE
    assert not world.receives.is_resting
    world.step()
    assert world.receives.is_resting


def test_an_aborted_one_keeps_its_blocks_until_its_word_says_that_no_writer_is_left() -> None:
    world = World()
    world.park("a", 5, 70)
    assert world.receives.finished("a")
    assert world.receives.watched() == [Watched(5, "a", True, [10, 11, 12])]
    assert world.step() == set()
    assert world.receives.num_external("g", 0) == (0, False)
    world.words[5] = DROP
    assert world.step() == {"a"}
    assert Received(5) not in world.heard
    assert world.heard[-1] == Freed(5)


def test_a_drop_alone_promotes_nothing() -> None:
    world = World()
    world.park("a", 5, 70)
    world.words[5] = DROP
    assert world.step() == set()
    assert world.receives.finished("a")
    assert world.step() == {"a"}


def test_one_that_never_got_blocks_is_freed_at_once() -> None:
    world = World()
    world.receives.add("a", Receive(5, 70), 70)
    world.receives.add_generate("g", Generate(5))
    assert world.receives.num_external("g", 0) == (None, False)
    assert not world.receives.finished("a")
    assert world.heard == [Freed(5)]
    assert world.receives.num_external("g", 0) == (0, False), "whoever waits for it waits no longer"


def test_asks_that_cannot_be_are_ordinary_requests() -> None:
    world = World()
    world.park("a", 5, 70)
    assert "there already" in (world.receives.add("b", Receive(5, 70), 70) or "")
    assert world.receives.num_external("b", 0) == (0, False)
    assert "ends at 71" in (world.receives.add("c", Receive(6, 71), 70) or "")
    assert world.receives.num_external("c", 0) == (0, False)
    assert world.heard[1:] == [Freed(6)]
    for stranger in "bc":
        world.receives.allocated(stranger, [1], 0)
        assert not world.receives.finished(stranger)


def test_one_that_vllm_does_not_let_wait_is_given_up() -> None:
    """It wants prompt logprobs, say, and reads no cache."""
    world = World()
    world.receives.add("a", Receive(5, 70), 70)
    world.receives.allocated("a", [1, 2, 3], 0)
    assert world.heard == [Freed(5)]
    assert not world.receives.finished("a")


def test_the_worker_reports_once_though_steps_overlap() -> None:
    world = World()
    watched = [Watched(5, "a", False, [])]
    world.words[5] = TAKE
    assert world.reports.due(watched) == watched
    assert world.reports.due(watched) == [], "made before the report was read"
    assert world.reports.due([]) == []


class VllmRules(RuleBasedStateMachine):
    """Any order of a front's and vLLM's acts; reports are read up to two steps late, as with batches in
    flight."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.status: dict[str, str] = {}
        """As vLLM has it: waiting, parked, ready (reported), running, ended (its blocks are kept)."""
        self.in_flight: list[tuple[set[str], set[str]]] = []
        self.next = 0

    def ids(self, *states: str) -> list[str]:
        return [each for each, status in self.status.items() if status in states and each.startswith("r")]

    @rule()
    def a_receive_comes(self) -> None:
        self.next += 1
        request_id = f"r{self.next}"
        assert self.world.receives.add(request_id, Receive(self.next, 40), 40) is None
        self.status[request_id] = "waiting"

    @rule(data=st.data())
    def a_generate_comes(self, data: st.DataObject) -> None:
        self.next += 1
        self.world.receives.add_generate(f"g{self.next}", Generate(data.draw(st.integers(0, self.next))))
        self.status[f"g{self.next}"] = "waiting"

    @rule(data=st.data())
    def vllm_allocates(self, data: st.DataObject) -> None:
        waiting = [each for each, status in self.status.items() if status == "waiting"]
        if not waiting:
            return
        request_id = data.draw(st.sampled_from(waiting))
        num_external, is_async = self.world.receives.num_external(request_id, 0)
        if num_external is None:
            return
        self.world.receives.allocated(request_id, [1, 2], num_external)
        self.status[request_id] = "parked" if is_async else "running"

    @rule(data=st.data())
    def vllm_promotes(self, data: st.DataObject) -> None:
        if ready := self.ids("ready"):
            self.status[data.draw(st.sampled_from(ready))] = "running"

    @rule(data=st.data())
    def a_request_ends(self, data: st.DataObject) -> None:
        """By its last token, or aborted, in whatever state."""
        alive = [each for each, status in self.status.items() if status != "ended"]
        if not alive:
            return
        request_id = data.draw(st.sampled_from(alive))
        is_parked = self.status[request_id] == "parked"
        if self.world.receives.finished(request_id) or is_parked:
            self.status[request_id] = "ended"
        else:
            del self.status[request_id]

    @rule(data=st.data(), word=st.sampled_from([TAKE, DROP]))
    def the_front_decides(self, data: st.DataObject, word: int) -> None:
        if self.next:
            receive = data.draw(st.integers(1, self.next))
            if self.world.words.get(receive, WAIT) < word:
                self.world.words[receive] = word

    @rule()
    def a_step(self) -> None:
        due = {each.request_id for each in self.world.reports.due(self.world.receives.watched())}
        released = {each.request_id for each in self.world.receives.releases()}
        self.in_flight.append((due, released))
        if len(self.in_flight) > 2:
            self.its_output_is_read()

    @precondition(lambda self: self.in_flight)
    @rule()
    def its_output_is_read(self) -> None:
        received, sent = self.in_flight.pop(0)
        self.world.receives.reported(received)
        self.world.receives.released(sent)
        for request_id in received:
            assert self.status.get(request_id) in ("parked", "ended"), "vLLM's assertion"
            if self.status[request_id] == "parked":
                assert self.world.words[int(request_id[1:])] == TAKE or self.was_taken(request_id)
                self.status[request_id] = "ready"
            else:
                del self.status[request_id]
        for request_id in sent:
            assert self.status.get(request_id) == "ended", "vLLM's assertion"
            del self.status[request_id]

    def was_taken(self, request_id: str) -> bool:
        """TAKE when it was reported, DROP by now."""
        return Received(int(request_id[1:])) in self.world.heard

    @invariant()
    def each_is_freed_once_and_never_behind_the_fronts_back(self) -> None:
        counts = Counter(notice.id for notice in self.world.heard if isinstance(notice, Freed))
        allocated = {notice.id for notice in self.world.heard if isinstance(notice, Allocated)}
        assert all(count == 1 for count in counts.values())
        for receive in counts:
            assert receive not in allocated or self.world.words.get(receive, WAIT) != WAIT

    def teardown(self) -> None:
        """A front that gives everything up gets everything back."""
        for receive in range(1, self.next + 1):
            self.world.words[receive] = max(self.world.words.get(receive, WAIT), DROP)
        for request_id in [each for each, status in self.status.items() if status != "ended"]:
            is_parked = self.status[request_id] == "parked"
            if self.world.receives.finished(request_id) or is_parked:
                self.status[request_id] = "ended"
            else:
                del self.status[request_id]
        for _ in range(4):
            self.a_step()
        while self.in_flight:
            self.its_output_is_read()
        assert self.status == {}
        assert self.world.receives.num_held == 0


TestVllmRules = VllmRules.TestCase
