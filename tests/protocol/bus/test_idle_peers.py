"""Peers that say when they speak next: not missed before, missed after, and due at once when asked."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microserve.protocol.bus.peers import MAX_NEXT_S, SIGNS, Loss, Peers

SILENCE_S = 1.5
INTERVAL_S = 0.5
NEXT_S = 2.0
Book = Peers[str, None]


@pytest.fixture
def book() -> Book:
    book: Book = Peers(interval_s=1000.0, silence_s=SILENCE_S)
    book.join("a", "a", 1, None, 0.0)
    return book


def lost(book: Book, now: float) -> list[tuple[str, Loss]]:
    return [(peer.key, loss) for peer, loss in book.expire(now)]


def test_who_is_idle_is_missed_after_three_of_its_signs(book: Book) -> None:
    assert book.are_idle is False
    book.heard("a", 0.0, next_s=NEXT_S)

    assert book.are_idle
    assert book.silent_in("a", 1.0) == pytest.approx(SIGNS * NEXT_S - 1.0)
    assert lost(book, SIGNS * NEXT_S) == []
    assert lost(book, SIGNS * NEXT_S + 0.1) == [("a", Loss.SILENT)]
    assert book.are_idle, "nobody is left"


def test_a_short_rest_allows_no_less_than_work_does(book: Book) -> None:
    book.heard("a", 0.0, next_s=0.1)

    assert lost(book, SILENCE_S) == []


def test_other_messages_change_nothing_and_a_sign_of_work_does(book: Book) -> None:
    book.heard("a", 0.0, next_s=NEXT_S)
    book.heard("a", 1.0)
    assert book.silent_in("a", 1.0) == pytest.approx(SIGNS * NEXT_S)

    book.heard("a", 2.0, next_s=0.0)
    assert lost(book, 2.0 + SILENCE_S + 0.1) == [("a", Loss.SILENT)]


def test_who_is_asked_has_the_time_that_is_allowed_at_work(book: Book) -> None:
    book.heard("a", 0.0, next_s=NEXT_S)
    book.rouse("a", 5.0)
    book.rouse("nobody", 5.0)

    assert not book.are_idle
    assert lost(book, 5.0 + SILENCE_S) == []
    assert lost(book, 5.0 + SILENCE_S + 0.1) == [("a", Loss.SILENT)]


def test_to_ask_who_is_not_idle_gives_no_time(book: Book) -> None:
    book.heard("a", 0.0, next_s=0.0)
    book.rouse("a", 1.0)

    assert lost(book, SILENCE_S + 0.1) == [("a", Loss.SILENT)]


@pytest.mark.parametrize("said", [1e300, math.inf, -math.inf, -1.0, math.nan])
def test_nobody_is_silent_for_ever(book: Book, said: float) -> None:
    book.heard("a", 0.0, next_s=said)

    assert lost(book, SIGNS * MAX_NEXT_S + 0.1) == [("a", Loss.SILENT)]


def test_a_new_connection_begins_awake(book: Book) -> None:
    book.heard("a", 0.0, next_s=NEXT_S)
    book.join("a", "a", 1, None, 1.0)

    assert not book.are_idle
    assert lost(book, 1.0 + SILENCE_S + 0.1) == [("a", Loss.SILENT)]


@given(st.integers(1, 6), st.floats(0.0, 100.0), st.floats(0.0, 0.25))
def test_a_stall_at_rest_loses_nobody_who_kept_his_word(beats: int, stall_s: float, late: float) -> None:
    """Signs come every ``NEXT_S`` and a bit, looks as well; then nobody runs for a while, and the look comes
    before what has been sent meanwhile is read."""
    book: Book = Peers(interval_s=INTERVAL_S, silence_s=SILENCE_S)
    book.join("a", "a", 1, None, 0.0)
    now = 0.0
    for _ in range(beats):
        book.heard("a", now, next_s=NEXT_S)
        assert book.expire(now, NEXT_S) == []
        now += NEXT_S * (1 + late)
    assert book.expire(now + stall_s, NEXT_S) == []
    book.heard("a", now + stall_s, next_s=NEXT_S)
    assert book.expire(now + stall_s + NEXT_S, NEXT_S) == []


def test_who_is_silent_at_rest_is_lost_also_by_a_process_that_is_always_late() -> None:
    book: Book = Peers(interval_s=INTERVAL_S, silence_s=SILENCE_S)
    book.join("a", "a", 1, None, 0.0)
    book.heard("a", 0.0, next_s=NEXT_S)
    book.expire(0.0, NEXT_S)
    looks = 0
    while "a" in book:
        looks += 1
        book.expire(looks * 60.0, NEXT_S)

    assert looks == SIGNS + 1
