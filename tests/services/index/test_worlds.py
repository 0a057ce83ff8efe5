"""The index's desk for worlds, with lost, repeated and disagreeing ranks. Sockets: test_rendezvous.py."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import structlog

from microserve.protocol import log
from microserve.protocol.errors import ConfigError, InvalidRequest, MeshError, QueueFull
from microserve.protocol.messages.world import (
    MAX_UNIQUE_ID_NBYTES,
    MAX_WORLDS,
    WorldRank,
)
from microserve.services.index.worlds import MAX_GIVEN
from tests.support.index.world_desk import SILENCE_S, Bench, join, unique_id

# --- a round


def test_all_are_told_at_once_and_the_round_is_forgotten() -> None:
    bench = Bench()
    bench.ask(2, 32, 3)
    bench.ask(0, 30, 3)
    assert not bench.joined()
    assert bench.present(32) == [2]
    assert bench.present(30) == [0, 2]

    bench.ask(1, 31, 3)

    told = bench.joined()
    assert sorted(told) == [b"30", b"31", b"32"]
    assert {each.unique_id for each in told.values()} == {unique_id(30)}
    assert [[rank.incarnation for rank in each.ranks] for each in told.values()] == [[30, 31, 32]] * 3
    assert {peer: each.call_id for peer, each in told.items()} == {b"30": 1030, b"31": 1031, b"32": 1032}
    assert bench.desk.num_waiting == 0


def test_one_rank_is_a_world() -> None:
    bench = Bench()
    bench.ask(0, 1, 1)
    assert list(bench.joined()) == [b"1"]


def test_a_rank_that_asks_again_is_one_rank() -> None:
    bench = Bench()
    bench.ask(0, 1)
    bench.ask(0, 1)
    bench.ask(0, 1, peer=b"its second connection")
    assert bench.desk.num_waiting == 1
    assert bench.present(1) == [0]
    bench.ask(1, 2)
    assert sorted(bench.joined()) == [b"2", b"its second connection"]


def test_an_id_is_given_out_once() -> None:
    """Rank 0 has missed the answer: the others are in the library already, with the id that it shows."""
    bench = Bench()
    bench.ask(0, 1)
    bench.ask(1, 2)
    bench.sent.clear()

    with structlog.testing.capture_logs() as logs:
        error = refused(bench, 0, 1)

    assert isinstance(error, InvalidRequest)
    assert error.field == "unique_id"
    assert not logs, "mostly it repeats what the answer has crossed"
    assert bench.desk.num_waiting == 0
    bench.ask(1, 3)
    bench.ask(0, 4)
    assert {each.unique_id for each in bench.joined().values()} == {unique_id(4)}


def test_so_many_ids_that_were_given_out_are_known_and_no_more() -> None:
    bench = Bench()
    for life in range(1, MAX_GIVEN + 2):
        bench.ask(0, life, 1)
    assert refused(bench, 0, 2, 1).field == "unique_id"
    assert len(bench.desk._given) == MAX_GIVEN


def test_a_silent_rank_has_left_and_its_id_with_it() -> None:
    bench = Bench()
    bench.ask(0, 1)
    bench.now += SILENCE_S + 0.1
    bench.desk.expire(bench.now)
    assert bench.desk.num_waiting == 0
    bench.ask(1, 2)
    assert bench.present(2) == [1]
    bench.ask(0, 3)
    assert bench.joined()[b"2"].unique_id == unique_id(3)


def test_an_id_is_kept_no_longer_than_its_rank_waits() -> None:
    bench = Bench()
    bench.ask(0, 1)
    [current] = bench.desk._rounds.values()
    assert current.unique_id == unique_id(1)
    bench.now += SILENCE_S + 0.1
    bench.desk.expire(bench.now)
    assert current.unique_id == b""


def test_a_rank_that_repeats_itself_stays() -> None:
    bench = Bench()
    for _ in range(5):
        bench.ask(0, 1)
        bench.now += SILENCE_S * 0.9
        bench.desk.expire(bench.now)
    assert bench.desk.num_waiting == 1


def test_the_id_is_not_given_out_while_one_of_the_ranks_is_gone() -> None:
    bench = Bench()
    bench.ask(0, 1)
    bench.gone.add(b"1")
    bench.ask(1, 2)
    assert not bench.joined()
    assert bench.desk.num_waiting == 1

    bench.ask(0, 3)

    assert {each.unique_id for each in bench.joined().values()} == {unique_id(3)}


def test_a_restarted_rank_takes_the_place_of_its_dead_life() -> None:
    bench = Bench()
    bench.ask(0, 1)
    bench.gone.add(b"1")
    bench.ask(0, 3)
    bench.ask(1, 2)
    assert sorted(bench.joined()) == [b"2", b"3"]


def test_worlds_of_other_names_do_not_meet() -> None:
    bench = Bench()
    bench.ask(0, 1)
    bench.ask(1, 2, world="other")
    assert not bench.joined()
    assert bench.desk.num_waiting == 2


# --- refusals


def refused(bench: Bench, rank: int, life: int, num_ranks: int = 2, **changes: Any) -> MeshError:
    with pytest.raises(MeshError) as caught:
        bench.ask(rank, life, num_ranks, **changes)
    return caught.value


def test_two_living_engines_cannot_be_one_rank() -> None:
    bench = Bench()
    bench.ask(1, 0xA)
    error = refused(bench, 1, 0xB)
    assert isinstance(error, InvalidRequest)
    assert (error.field, error.detail) == (
        "rank",
        "rank 1 of world w is claimed by two living engines, 0xa and 0xb",
    )
    bench.ask(0, 1)
    assert sorted(bench.joined()) == [b"1", b"10"], "the first one keeps its place"


def test_ranks_that_disagree_on_their_number_are_told_so() -> None:
    bench = Bench()
    bench.ask(0, 1)
    error = refused(bench, 1, 2, 3)
    assert error.field == "num_ranks"
    assert error.detail == "ranks [0] wait for a world w of 2 ranks, rank 1 says 3"
    bench.gone.add(b"1")
    bench.ask(1, 2, 3)
    assert bench.present(2) == [1]


def test_ranks_that_disagree_on_their_memory_are_told_so() -> None:
    """The library takes it from all at once, and does not look whether they mean the same."""
    bench = Bench()
    bench.ask(0, 1, memory_nbytes=64)
    error = refused(bench, 1, 2, memory_nbytes=128)
    assert error.field == "memory_nbytes"
    assert error.detail == "ranks [0] wait for a world w of 64 bytes of memory each, rank 1 says 128"
    bench.ask(1, 2, memory_nbytes=64)
    assert sorted(bench.joined()) == [b"1", b"2"]


def test_a_lonely_rank_may_change_its_mind() -> None:
    bench = Bench()
    bench.ask(0, 1, 3)
    bench.gone.add(b"1")
    bench.ask(0, 2, 2, memory_nbytes=64)
    bench.ask(1, 3, 2, memory_nbytes=64)
    assert sorted(bench.joined()) == [b"2", b"3"]


def test_one_engine_is_one_rank() -> None:
    bench = Bench()
    bench.ask(0, 1, 3)
    assert refused(bench, 1, 1, 3).field == "rank"
    assert refused(bench, 1, 2, 3, peer=b"1").field == "rank"


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"world": ""}, "world"),
        ({"world": "w" * 65}, "world"),
        ({"world": "a b"}, "world"),
        ({"num_ranks": 0}, "num_ranks"),
        ({"num_ranks": 513}, "num_ranks"),
        ({"rank": 2}, "rank"),
        ({"rank": -1}, "rank"),
        ({"unique_id": b""}, "unique_id"),
        ({"unique_id": bytes(MAX_UNIQUE_ID_NBYTES + 1)}, "unique_id"),
        ({"rank": 1, "unique_id": b"mine"}, "unique_id"),
        ({"memory_nbytes": -1}, "memory_nbytes"),
        ({"who": WorldRank(0, "host", 1)}, "who"),
        ({"who": WorldRank(1, "h" * 129, 1)}, "who"),
        ({"who": WorldRank(1, "host", -1)}, "who"),
    ],
)
def test_a_claim_out_of_its_bounds_is_refused(changes: dict[str, Any], field: str) -> None:
    bench = Bench()
    with pytest.raises(InvalidRequest) as caught:
        bench.desk.join(b"peer", msgspec.structs.replace(join(0, 1), **changes), bench.now)
    assert caught.value.field == field
    assert bench.desk.num_waiting == 0


def test_without_keys_no_id_is_taken() -> None:
    bench = Bench(has_keys=False)
    error = refused(bench, 0, 1)
    assert isinstance(error, ConfigError)
    assert error.field == "bus.curve_dir"


def test_so_many_worlds_wait_and_no_more() -> None:
    bench = Bench()
    for number in range(MAX_WORLDS):
        bench.ask(0, number + 1, world=f"w{number}")
    assert isinstance(refused(bench, 0, 1000, world="one-more"), QueueFull)
    bench.ask(1, 2000, world="w0")
    bench.ask(0, 1000, world="one-more")


def test_no_log_error_or_repr_shows_an_id() -> None:
    bench = Bench()
    with structlog.testing.capture_logs() as logs:
        bench.ask(0, 1)
        refused(bench, 0, 2)
        bench.ask(1, 3)
    assert [entry["event"] for entry in logs] == [log.WORLD_REFUSED, log.WORLD_FORMED]
    shown = repr(logs) + repr(join(0, 1)) + repr(bench.joined()) + repr(vars(bench.desk))
    assert "secret" not in shown
    assert "secret" in repr(bench.joined()[b"1"].unique_id)
