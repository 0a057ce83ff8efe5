"""Who counts as alive."""

from __future__ import annotations

import pytest

from microserve.protocol.bus.liveness import LivenessBook, Loss

SILENCE_S = 3.0
STUCK_S = 20.0


@pytest.fixture
def book() -> LivenessBook:
    book = LivenessBook(silence_s=SILENCE_S, stuck_s=STUCK_S)
    book.joined("a", 1, 0.0)
    return book


def beats(book: LivenessBook, *, until_s: int, progress: int, busy: bool, since_s: int = 0) -> None:
    for second in range(since_s + 1, until_s + 1):
        assert book.heard("a", 1, float(second))
        book.progressed("a", progress=progress, busy=busy, now=float(second))
        assert book.expire(float(second)) == []


def test_membership(book: LivenessBook) -> None:
    assert "a" in book
    assert "b" not in book
    assert len(book) == 1
    assert book.incarnation("a") == 1
    assert book.incarnation("b") is None
    book.left("a")
    book.left("a")
    assert len(book) == 0


def test_silence_ends_a_peer_once(book: LivenessBook) -> None:
    assert book.expire(SILENCE_S) == []
    assert book.expire(SILENCE_S + 0.1) == [("a", Loss.SILENT)]
    assert book.expire(SILENCE_S + 0.2) == []
    assert "a" not in book


def test_any_message_is_a_sign_of_life(book: LivenessBook) -> None:
    assert book.heard("a", 1, 2.0)
    assert book.expire(4.9) == []


@pytest.mark.parametrize(("peer_id", "incarnation"), [("a", 2), ("b", 1)])
def test_message_of_a_stranger_or_of_another_life_is_none(
    book: LivenessBook, peer_id: str, incarnation: int
) -> None:
    assert not book.heard(peer_id, incarnation, 2.0)
    assert book.expire(3.1) == [("a", Loss.SILENT)]


def test_new_life_starts_afresh(book: LivenessBook) -> None:
    book.joined("a", 2, 2.9)

    assert book.expire(5.0) == []
    assert not book.heard("a", 1, 5.0)
    assert book.heard("a", 2, 5.0)


def test_busy_peer_whose_progress_stands_still_is_stuck(book: LivenessBook) -> None:
    beats(book, until_s=20, progress=0, busy=True)
    book.heard("a", 1, 20.5)

    assert book.expire(20.6) == [("a", Loss.STUCK)]


def test_progress_resets_the_clock(book: LivenessBook) -> None:
    beats(book, until_s=15, progress=5, busy=True)
    beats(book, since_s=15, until_s=35, progress=6, busy=True)
    book.heard("a", 1, 36.5)

    assert book.expire(36.6) == [("a", Loss.STUCK)]


def test_idle_peer_is_not_stuck_and_work_that_comes_has_its_own_time(book: LivenessBook) -> None:
    beats(book, until_s=100, progress=5, busy=False)
    beats(book, since_s=100, until_s=120, progress=5, busy=True)

    book.heard("a", 1, 120.5)
    assert book.expire(120.6) == [("a", Loss.STUCK)]


def test_peer_that_never_tells_of_work_is_not_stuck(book: LivenessBook) -> None:
    for second in range(1, 100):
        assert book.heard("a", 1, float(second))
        assert book.expire(float(second)) == []


def test_progress_of_a_stranger_is_ignored(book: LivenessBook) -> None:
    book.progressed("b", progress=1, busy=True, now=1.0)

    assert len(book) == 1


def test_silence_is_named_before_standstill(book: LivenessBook) -> None:
    book.progressed("a", progress=0, busy=True, now=1.0)

    assert book.expire(100.0) == [("a", Loss.SILENT)]


def test_only_the_lost_are_removed(book: LivenessBook) -> None:
    book.joined("b", 7, 2.0)

    assert book.expire(4.0) == [("a", Loss.SILENT)]
    assert "b" in book


def test_when_a_silent_peer_will_be_missed() -> None:
    book = LivenessBook(silence_s=3.0, stuck_s=10.0)
    book.joined("a", 1, 100.0)
    assert book.silent_in("a", 101.0) == 2.0
    assert book.heard("a", 1, 102.0)
    assert book.silent_in("a", 102.5) == 2.5
    assert book.silent_in("a", 200.0) == 0.0
    assert book.silent_in("b", 0.0) == 0.0
