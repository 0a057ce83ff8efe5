"""Whose turn it is: every pair of a class once, shared among the routers, none for ever left out."""

from __future__ import annotations

from itertools import permutations

from hypothesis import given
from hypothesis import strategies as st

from microserve.protocol.messages.engine_info import PREP_RECV, REMOTE_SEND, EngineInfo
from microserve.protocol.messages.numerics import UNKNOWN, Numerics
from microserve.services.router.check.rota import Pair, Rota, pairs_of, share_of
from tests.support.index.index_world import make_info

CLASSES = [UNKNOWN, Numerics("a", is_exact=True), Numerics("b")]


def infos_of(classes: list[int], can: list[str] | None = None) -> list[EngineInfo]:
    return [make_info(f"e{n}", numerics=CLASSES[number], can=can) for n, number in enumerate(classes)]


def never(pair: Pair) -> bool:
    return False


@given(st.lists(st.integers(0, 2), max_size=9))
def test_each_pair_of_a_class_is_there_once_and_no_other_is(classes: list[int]) -> None:
    infos = infos_of(classes)
    found = pairs_of(infos)
    wanted = {
        (a.engine_id, b.engine_id)
        for a, b in permutations(infos, 2)
        if a.numerics.name and a.numerics == b.numerics
    }
    alone = {
        (a.engine_id, "")
        for a in infos
        if a.numerics.name and sum(a.numerics == b.numerics for b in infos) == 1
    }
    assert len(found) == len(set(found))
    assert set(found) == wanted | alone
    assert found == pairs_of(infos[::-1]), "every router has the same list"


@given(st.integers(2, 12))
def test_after_as_many_checks_as_engines_each_has_sent_and_received(num_engines: int) -> None:
    first = pairs_of(infos_of([1] * num_engines))[:num_engines]
    assert {source for source, _ in first} == {target for _, target in first}
    assert len({source for source, _ in first}) == num_engines


def test_who_sends_or_receives_nothing_is_checked_alone() -> None:
    sender, receiver, neither = (
        make_info("s", numerics=CLASSES[1], can=[REMOTE_SEND]),
        make_info("r", numerics=CLASSES[1], can=[PREP_RECV]),
        make_info("n", numerics=CLASSES[1], can=[]),
    )
    assert set(pairs_of([sender, receiver, neither])) == {("s", "r"), ("r", ""), ("n", "")}


@given(st.integers(2, 8), st.sets(st.sampled_from("pqrst"), min_size=1))
def test_routers_share_the_pairs(num_engines: int, routers: set[str]) -> None:
    pairs = pairs_of(infos_of([1] * num_engines))
    parts = [share_of(pairs, sorted(routers), each) for each in routers]
    assert sorted(pair for part in parts for pair in part) == sorted(pairs)
    assert [*share_of(pairs, [], "p")] == pairs, "who is told of no router does all"


@given(st.data(), st.integers(2, 5), st.sampled_from([["r"], ["r", "s"], ["q", "r", "s"]]))
def test_every_pair_of_a_part_has_its_turn(data: st.DataObject, num_engines: int, routers: list[str]) -> None:
    infos = infos_of([1] * num_engines)
    part = share_of(pairs_of(infos), routers, "r")
    barred = data.draw(st.sets(st.sampled_from([*part]))) if part else set()
    rota, seen = Rota(), []
    for _ in range(2 * len(part) + 2):
        pair = rota.next(infos, routers, "r", is_free=lambda _: True, is_barred=barred.__contains__)
        assert (pair is None) == (not part)
        if pair is not None:
            seen.append(pair)
    assert set(seen) == set(part)
    if barred:
        assert all(pair in barred for pair in seen[::2]), "every other turn is one of theirs"


@given(st.lists(st.booleans(), min_size=2, max_size=6))
def test_engines_without_room_are_left_out_and_come_later(is_free: list[bool]) -> None:
    infos = infos_of([1] * len(is_free))
    free = {info.engine_id for info, each in zip(infos, is_free, strict=True) if each}
    rota = Rota()
    pair = rota.next(infos, ["r"], "r", is_free=free.__contains__, is_barred=never)
    assert (pair is None) == (len(free) < 2)
    assert pair is None or set(pair) <= free
    seen = {
        rota.next(infos, ["r"], "r", is_free=lambda _: True, is_barred=never)
        for _ in range(len(pairs_of(infos)))
    }
    assert len(seen | {pair} - {None}) == len(pairs_of(infos))
