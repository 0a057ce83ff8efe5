"""Whose request begins next: fair by what was served, within what the mesh can take; nobody starves."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microserve.services.router.serving.turns import ABOUT_S, REMEMBER_S, Room, Turns
from tests.support.examples import examples

WIDE = Room(num_engines=1000, num_places=math.inf, num_tokens=math.inf, tokens_per_s=math.inf)


def enter(
    turns: Turns, tenant: str, count: int, *, tokens: int = 10, priority: int = 0, now: float = 0.0
) -> None:
    have = turns.num_requests(tenant)
    for number in range(have, have + count):
        turns.enter(f"{tenant}{number}", tenant, priority, tokens, now)


def test_a_flood_waits_behind_its_own() -> None:
    turns = Turns(0.0)
    enter(turns, "a", 50)
    enter(turns, "b", 2)
    narrow = WIDE._replace(num_places=1)
    order = []
    for _ in range(6):
        [begun] = turns.begin(narrow, 0.0)
        order.append(begun)
        turns.leave(begun)
    assert order == ["a0", "b0", "a1", "b1", "a2", "a3"]


def test_who_was_away_gets_its_share_and_not_more() -> None:
    turns, narrow = Turns(0.0), WIDE._replace(num_places=1)
    enter(turns, "a", 30)
    for number in range(20):
        assert turns.begin(narrow, 0.0) == [f"a{number}"]
        turns.leave(f"a{number}")
    enter(turns, "b", 10)
    begun = []
    for _ in range(8):
        begun += turns.begin(narrow, 0.0)
        turns.leave(begun[-1])
    assert Counter(each[0] for each in begun) == {"a": 4, "b": 4}


def test_long_prompts_and_long_outputs_count() -> None:
    turns, narrow = Turns(0.0), WIDE._replace(num_places=1)
    enter(turns, "a", 9, tokens=100)
    enter(turns, "b", 9, tokens=10)
    begun = []
    for _ in range(9):
        begun += turns.begin(narrow, 0.0)
        turns.leave(begun[-1], 190 if begun[-1][0] == "b" else 0)
    assert Counter(each[0] for each in begun) == {"a": 6, "b": 3}


def test_a_higher_priority_goes_first_whoever_it_is() -> None:
    turns = Turns(0.0)
    enter(turns, "a", 2, priority=-1)
    enter(turns, "b", 1)
    turns.enter("a-urgent", "a", 5, 10, 0.0)
    assert turns.begin(WIDE, 0.0) == ["a-urgent", "b0", "a0", "a1"]


def test_what_is_not_computed_yet_is_bounded() -> None:
    turns, room = Turns(0.0), WIDE._replace(num_engines=2, num_tokens=100)
    enter(turns, "b", 1)
    enter(turns, "a", 60, tokens=30)
    begun = turns.begin(room, 0.0)
    assert begun == ["b0", "a0", "a1", "a2", "a3"], "two at least, and up to a hundred tokens"
    turns.computed("a0")
    turns.computed("a0")
    turns.leave("a1")
    assert turns.begin(room, 0.0) == ["a4", "a5"]
    long = Turns(0.0)
    enter(long, "b", 1)
    enter(long, "a", 9, tokens=5000)
    assert long.begin(room, 0.0) == ["b0", "a0", "a1"], "an engine is not left idle for its length"


def test_places_are_kept_for_those_with_less_than_their_share() -> None:
    turns, room = Turns(0.0), WIDE._replace(num_places=16)
    enter(turns, "a", 40)
    enter(turns, "b", 1)
    begun = turns.begin(room, 0.0)
    assert Counter(each[0] for each in begun) == {"a": 13, "b": 1}
    enter(turns, "b", 9)
    assert [each[0] for each in turns.begin(room, 0.0)] == ["b", "b"]
    turns.leave("b0")
    alone = Turns(0.0)
    enter(alone, "a", 40)
    assert len(alone.begin(room, 0.0)) == 16, "nobody else is about"


def test_what_others_leave_is_not_all_used() -> None:
    turns, room = Turns(0.5), WIDE._replace(tokens_per_s=1000.0)
    enter(turns, "b", 1, tokens=100)
    enter(turns, "a", 90, tokens=100)
    assert turns.begin(room, 0.0) == ["b0", "a0", "a1", "a2", "a3", "a4", "a5"]
    assert turns.begin(room, 0.01) == []
    assert len(turns.begin(room, 0.7)) >= 2, "what was used fades"
    turns.leave("b0")
    for each in range(90):
        turns.leave(f"a{each}")
    enter(turns, "a", 90, tokens=100, now=1.0 + ABOUT_S)
    assert len(turns.begin(room, 1.0 + ABOUT_S)) == 90, "nobody else is about"


def test_a_tenant_is_forgotten_in_time() -> None:
    turns = Turns(0.5)
    for number in range(1000):
        now = number * REMEMBER_S / 10
        turns.enter("r", f"tenant {number}", 0, 1, now)
        turns.leave("r")
        assert len(turns._tenants) <= 13


@settings(deadline=None, max_examples=examples(50))
@given(seed=st.integers(0, 1 << 32))
def test_any_order_of_things_keeps_the_bounds_and_starves_nobody(seed: int) -> None:
    rng, now, number = random.Random(seed), 0.0, 0
    turns = Turns(rng.choice([0.0, 0.5, 1.0]))
    places, tokens = rng.choice([1, 4, 16, math.inf]), rng.choice([10, 500])
    room = Room(rng.randint(1, 3), places, tokens, rng.choice([50, math.inf]))
    waiting: dict[str, str] = {}
    running: dict[str, str] = {}

    def begin() -> None:
        for request_id in turns.begin(room, now):
            running[request_id] = waiting.pop(request_id)

    for _ in range(120):
        now += rng.random() * 0.3
        step = rng.random()
        if step < 0.5:
            number += 1
            tenant = rng.choice("aaaaabbc")
            waiting[f"r{number}"] = tenant
            turns.enter(f"r{number}", tenant, rng.choice([0, 0, 1]), rng.randint(0, 300), now)
        elif step < 0.7 and running:
            turns.computed(rng.choice(sorted(running)))
        elif running or waiting:
            over = rng.choice(sorted({**running, **waiting}))
            running.pop(over, None)
            waiting.pop(over, None)
            turns.leave(over, rng.randint(0, 50))
        begin()
        turns.check_integrity()
        assert turns.num_waiting == len(waiting)
        assert len(running) <= max(1, room.num_places)
    # With time alone, and ends, everybody has a turn.
    for _ in range(600):
        if not waiting:
            break
        now += 0.5
        for over in sorted(running):
            turns.leave(over)
        running.clear()
        begin()
    assert not waiting
    for over in sorted(running):
        turns.leave(over)
    assert turns.num_waiting == 0 and turns.tokens_ahead("a") == 0.0
    turns.check_integrity()


def test_what_is_ahead_of_the_next_one() -> None:
    turns = Turns(0.0)
    enter(turns, "a", 5, tokens=100)
    enter(turns, "b", 1, tokens=50)
    assert (turns.tokens_ahead("a"), turns.tokens_ahead("b")) == (550, 100)
    assert turns.tokens_ahead("c") == pytest.approx(0.0), "who has nothing here waits for nobody's queue"
