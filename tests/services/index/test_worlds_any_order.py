"""The index's desk for worlds: ranks ask, die, come back and fall silent in any order."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microserve.protocol.errors import InvalidRequest
from microserve.protocol.messages.world import WorldJoined
from tests.support.examples import examples
from tests.support.index.world_desk import SILENCE_S, Bench, unique_id

MOVES = st.lists(
    st.tuples(
        st.sampled_from(["ask"] * 6 + ["die", "wait", "silent"]),
        st.integers(0, 2),  # rank
        st.sampled_from([0] * 5 + [1]),  # which of the rank's processes
        st.sampled_from([3] * 9 + [2]),  # its number of ranks
    ),
    min_size=20,
    max_size=60,
)


@pytest.mark.slow
@settings(max_examples=examples(300), deadline=None)
@given(MOVES)
def test_who_is_told_is_told_the_same_as_all_others_who_live(moves: list[tuple[str, int, int, int]]) -> None:
    """Processes ask, die, are restarted and fall silent; two may claim one rank."""
    bench = Bench()
    lives: dict[tuple[int, int], int] = {}
    heard: dict[int, tuple[int, int, float]] = {}
    given: set[int] = set()
    """Lives whose id was given out."""
    num_lives = 0
    for kind, rank, which, num_ranks in moves:
        at = rank, which
        if at not in lives:
            num_lives += 1
            lives[at] = num_lives
        life = lives[at]
        seen = len(bench.sent)
        if kind == "ask" and rank < num_ranks:
            rivals = [
                other for place, other in lives.items() if place == (rank, 1 - which) and other in heard
            ]
            others = {n for other, (r, n, _) in heard.items() if r != rank}
            try:
                bench.ask(rank, life, num_ranks)
            except InvalidRequest as error:
                reasons = {"rank": rivals, "num_ranks": others - {num_ranks}, "unique_id": {life} & given}
                assert reasons[str(error.field)]
            else:
                assert not rivals and not others - {num_ranks} and life not in given
                heard[life] = rank, num_ranks, bench.now
        elif kind == "die":
            bench.gone.add(str(life).encode())
            heard.pop(life, None)
            del lives[at]
        elif kind == "wait":
            bench.now += 0.5
        elif kind == "silent":
            bench.desk.expire(bench.now)
            heard = {k: v for k, v in heard.items() if bench.now - v[2] <= SILENCE_S}
        told = {int(peer): reply for peer, reply in bench.sent[seen:] if isinstance(reply, WorldJoined)}
        if told:
            [first, *_] = told.values()
            names = [each.incarnation for each in first.ranks]
            assert sorted(told) == sorted(names), "all of them, once each"
            assert [heard[name][0] for name in names] == list(range(len(names))), "who live, at their ranks"
            assert {heard[name][1] for name in names} == {len(names)}
            assert all(
                (reply.unique_id, reply.ranks) == (unique_id(names[0]), first.ranks)
                for reply in told.values()
            )
            given.add(names[0])
            for name in names:
                del heard[name]
        assert bench.desk.num_waiting <= 5
