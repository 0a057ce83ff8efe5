"""Who counts as alive: one table, one rule, whatever this process or its peers do meanwhile."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from microserve.protocol.bus.peers import Listening, Loss, Peer, Peers
from tests.support.examples import examples

SILENCE_S = 3.0
STUCK_S = 20.0
NEVER_LATE_S = 1000.0
"""The interval, where a test is not about looks that are late: time counts as it is."""
Book = Peers[str, None]


def join(book: Book, name: str, incarnation: int, now: float) -> list[Peer[str, None]]:
    return book.join(name, name, incarnation, None, now)[1]


def lost(book: Book, now: float) -> list[tuple[str, Loss]]:
    return [(peer.key, loss) for peer, loss in book.expire(now)]


@pytest.fixture
def book() -> Book:
    book: Book = Peers(interval_s=NEVER_LATE_S, silence_s=SILENCE_S, stuck_s=STUCK_S)
    join(book, "a", 1, 0.0)
    return book


def beats(book: Book, *, until_s: int, progress: int, busy: bool, since_s: int = 0) -> None:
    for second in range(since_s + 1, until_s + 1):
        assert book.heard("a", float(second), 1)
        book.progressed("a", progress=progress, busy=busy, now=float(second))
        assert lost(book, float(second)) == []


def test_membership(book: Book) -> None:
    assert "a" in book
    assert "b" not in book
    assert len(book) == 1
    assert [(peer.key, peer.incarnation) for peer in book] == [("a", 1)]
    assert book.find("b") is None
    assert book.remove("a") is not None
    assert book.remove("a") is None
    assert len(book) == 0


def test_silence_ends_a_peer_once(book: Book) -> None:
    assert lost(book, SILENCE_S) == []
    assert lost(book, SILENCE_S + 0.1) == [("a", Loss.SILENT)]
    assert lost(book, SILENCE_S + 0.2) == []
    assert "a" not in book


def test_any_message_is_a_sign_of_life(book: Book) -> None:
    assert book.heard("a", 2.0, 1)
    assert lost(book, 4.9) == []


@pytest.mark.parametrize(("peer_id", "incarnation"), [("a", 2), ("b", 1)])
def test_message_of_a_stranger_or_of_another_life_is_none(book: Book, peer_id: str, incarnation: int) -> None:
    assert not book.heard(peer_id, 2.0, incarnation)
    assert lost(book, 3.1) == [("a", Loss.SILENT)]


def test_new_life_starts_afresh(book: Book) -> None:
    join(book, "a", 2, 2.9)

    assert lost(book, 5.0) == []
    assert not book.heard("a", 5.0, 1)
    assert book.heard("a", 5.0, 2)


def test_busy_peer_whose_progress_stands_still_is_stuck(book: Book) -> None:
    beats(book, until_s=20, progress=0, busy=True)
    book.heard("a", 20.5, 1)

    assert lost(book, 20.6) == [("a", Loss.STUCK)]


def test_progress_resets_the_clock(book: Book) -> None:
    beats(book, until_s=15, progress=5, busy=True)
    beats(book, since_s=15, until_s=35, progress=6, busy=True)
    book.heard("a", 36.5, 1)

    assert lost(book, 36.6) == [("a", Loss.STUCK)]


def test_idle_peer_is_not_stuck_and_work_that_comes_has_its_own_time(book: Book) -> None:
    beats(book, until_s=100, progress=5, busy=False)
    beats(book, since_s=100, until_s=120, progress=5, busy=True)

    book.heard("a", 120.5, 1)
    assert lost(book, 120.6) == [("a", Loss.STUCK)]


def test_peer_that_never_tells_of_work_is_not_stuck(book: Book) -> None:
    for second in range(1, 100):
        assert book.heard("a", float(second), 1)
        assert lost(book, float(second)) == []


def test_progress_of_a_stranger_is_ignored(book: Book) -> None:
    book.progressed("b", progress=1, busy=True, now=1.0)

    assert len(book) == 1


def test_silence_is_named_before_standstill(book: Book) -> None:
    book.progressed("a", progress=0, busy=True, now=1.0)

    assert lost(book, 100.0) == [("a", Loss.SILENT)]


def test_only_the_lost_are_removed(book: Book) -> None:
    join(book, "b", 7, 2.0)

    assert lost(book, 4.0) == [("a", Loss.SILENT)]
    assert "b" in book


def test_when_a_silent_peer_will_be_missed() -> None:
    book: Book = Peers(interval_s=NEVER_LATE_S, silence_s=3.0)
    join(book, "a", 1, 100.0)
    assert book.silent_in("a", 101.0) == 2.0
    assert book.heard("a", 102.0, 1)
    assert book.silent_in("a", 102.5) == 2.5
    assert book.silent_in("a", 200.0) == 0.0
    assert book.silent_in("b", 0.0) == 0.0


# --- hello: lives and connections --------------------------------------------------------------------


def test_a_known_life_that_says_hello_again_keeps_its_place() -> None:
    peers: Peers[bytes, list[int]] = Peers(interval_s=NEVER_LATE_S, silence_s=SILENCE_S)
    first, _ = peers.join(b"p1", "r", 1, [1], 0.0)
    again, replaced = peers.join(b"p1", "r", 1, [2], 1.0)

    assert (again, again.value, replaced) == (first, [1], [])
    assert peers.silent_in(b"p1", 1.0) == SILENCE_S


@pytest.mark.parametrize(
    ("key", "name", "incarnation"),
    [(b"p1", "r", 2), (b"p2", "r", 1), (b"p2", "r", 2), (b"p1", "s", 2)],
    ids=["new life", "new connection", "both", "another behind the connection"],
)
def test_a_new_life_and_a_new_connection_replace_the_old_one(key: bytes, name: str, incarnation: int) -> None:
    peers: Peers[bytes, str] = Peers(interval_s=NEVER_LATE_S, silence_s=SILENCE_S)
    first, _ = peers.join(b"p1", "r", 1, "first", 0.0)
    other, _ = peers.join(b"p9", "t", 1, "other", 0.0)
    second, replaced = peers.join(key, name, incarnation, "second", 1.0)

    assert replaced == [first]
    assert list(peers) == [other, second]
    assert second.value == "second"


def test_one_hello_may_replace_two() -> None:
    peers: Peers[bytes, None] = Peers(interval_s=NEVER_LATE_S, silence_s=SILENCE_S)
    first, _ = peers.join(b"p1", "r", 1, None, 0.0)
    second, _ = peers.join(b"p2", "s", 1, None, 0.0)
    third, replaced = peers.join(b"p2", "r", 2, None, 0.0)

    assert replaced == [first, second]
    assert list(peers) == [third]


# --- stalls of our own -------------------------------------------------------------------------------

INTERVAL_S = 0.25


def test_a_stall_counts_as_one_interval() -> None:
    listening = Listening(INTERVAL_S)
    assert listening.look(100.0) == 0.0
    assert listening.time(100.1) == pytest.approx(0.1)
    assert listening.look(100.25) == pytest.approx(0.25)
    assert listening.look(900.0) == pytest.approx(0.5)
    assert listening.time(900.0) == pytest.approx(0.5)


def test_work_that_stood_still_while_nobody_looked_is_not_stuck() -> None:
    book: Book = Peers(interval_s=INTERVAL_S, silence_s=1.5, stuck_s=STUCK_S)
    join(book, "a", 1, 0.0)
    book.progressed("a", progress=5, busy=True, now=0.0)

    assert lost(book, 3 * STUCK_S) == []
    book.heard("a", 3 * STUCK_S)
    assert lost(book, 3 * STUCK_S + INTERVAL_S) == []


@pytest.mark.parametrize("gap_s", [INTERVAL_S, 0.6, 5.0], ids=["in time", "late", "always very late"])
def test_a_process_that_is_always_late_still_loses_the_silent(gap_s: float) -> None:
    book: Book = Peers(interval_s=INTERVAL_S, silence_s=6 * INTERVAL_S)
    join(book, "a", 1, 0.0)
    join(book, "b", 1, 0.0)
    looks = 0
    while "a" in book:
        looks += 1
        book.heard("b", looks * gap_s)
        assert lost(book, looks * gap_s) in ([], [("a", Loss.SILENT)])

    assert looks == 7
    assert "b" in book


class StallMachine(RuleBasedStateMachine):
    """A process that stalls, with peers that come, speak, fall silent, are replaced and come back.

    What a living peer says during a stall lies in a socket and is read after the look that was due then, as
    late as a loop may do it. Living is who says something every interval, as WIRE.md 3.5 asks.
    """

    LIVENESS = 4

    def __init__(self) -> None:
        super().__init__()
        self.peers: Peers[str, int] = Peers(interval_s=INTERVAL_S, silence_s=self.LIVENESS * INTERVAL_S)
        self.now = 1000.0
        self.living: dict[str, int] = {}
        """Incarnation by name."""
        self.silent_looks: dict[str, int] = {}
        """Those in the table that say nothing any more, and looks since then."""
        self.num_lives = 0
        self.peers.expire(self.now)

    names = st.sampled_from("abc")

    @rule(name=names)
    def join(self, name: str) -> None:
        known = self.peers.find(name)
        self.num_lives += 1
        peer, replaced = self.peers.join(name, name, self.num_lives, self.num_lives, self.now)
        assert replaced == ([known] if known else [])
        assert peer.value == self.num_lives
        self.living[name] = self.num_lives
        self.silent_looks.pop(name, None)

    @rule(name=names)
    def fall_silent(self, name: str) -> None:
        if self.living.pop(name, None) is not None:
            self.silent_looks[name] = 0

    @rule(name=names)
    def leave(self, name: str) -> None:
        assert (self.peers.remove(name) is not None) == (name in self.living or name in self.silent_looks)
        self.living.pop(name, None)
        self.silent_looks.pop(name, None)

    @rule(name=names)
    def an_old_life_speaks(self, name: str) -> None:
        assert self.peers.heard(name, self.now, -1) is None

    @rule(late_s=st.sampled_from([0.0, 0.0, 0.01, 0.2, 0.3, 0.6, 1.0, 1.4, 7.0, 3600.0]))
    def look(self, late_s: float) -> None:
        """One interval, in which the living speak, then perhaps a stall, then the look, then what waited."""
        self.now += INTERVAL_S * 0.9
        if not late_s:
            self.everybody_speaks()
        self.now += INTERVAL_S * 0.1 + late_s
        lost = {peer.key: loss for peer, loss in self.peers.expire(self.now)}
        assert not lost.keys() & self.living.keys(), "a living peer is never lost, however we stall"
        for name in lost:
            looks = self.silent_looks.pop(name)
            assert looks >= self.LIVENESS - 1, "nobody is lost early"
        for name in self.silent_looks:
            self.silent_looks[name] += 1
            assert self.silent_looks[name] <= self.LIVENESS + 1, "a silent one is lost within the bound"
        self.everybody_speaks()

    def everybody_speaks(self) -> None:
        for name, incarnation in self.living.items():
            assert self.peers.heard(name, self.now, incarnation) is not None

    @invariant()
    def table_is_whole(self) -> None:
        assert {peer.key for peer in self.peers} == self.living.keys() | self.silent_looks.keys()


StallMachine.TestCase.settings = settings(max_examples=examples(150), stateful_step_count=50, deadline=None)
TestStalls = StallMachine.TestCase
