"""What routers found: the last of each pair counts, whoever made it and however often it is told."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from microserve.protocol.messages.check import (
    CACHED,
    DIFFERS,
    EQUAL,
    MAX_REPORTED,
    TRANSFERRED,
    UNFINISHED,
    PairCheck,
    Suspect,
)
from microserve.protocol.messages.engine_info import EngineInfo
from microserve.protocol.messages.numerics import Numerics
from microserve.services.index import checks as module
from microserve.services.index.checks import KEPT_S, CheckDesk
from tests.support.index.index_world import make_info

EXACT = Numerics("a", is_exact=True)
MEMBERS: dict[str, EngineInfo] = {name: make_info(name, numerics=EXACT) for name in ("e1", "e2", "e3")}


def check(
    outcome: str, differs: str = "", *, number: int = 1, age_s: float = 0.0, target: str = "e2"
) -> PairCheck:
    return PairCheck("e1", target, outcome, differs, number=number, age_s=age_s)


checks = st.builds(
    PairCheck,
    source=st.sampled_from(["e1", "e2"]),
    target=st.sampled_from(["e3", ""]),
    outcome=st.sampled_from([EQUAL, DIFFERS, UNFINISHED]),
    differs=st.sampled_from([CACHED, TRANSFERRED]),
)
"""``differs`` counts only where the outcome says so."""


@given(st.lists(st.tuples(st.sampled_from(["r", "s"]), checks), max_size=12), st.data())
def test_however_often_it_is_told_and_in_whatever_order(
    made: list[tuple[str, PairCheck]], data: st.DataObject
) -> None:
    """Routers repeat themselves; a new life of the index hears all of it anew, in an order of its own."""
    once, again = CheckDesk(), CheckDesk()
    told: list[tuple[str, PairCheck]] = []
    for number, (router, drawn) in enumerate(made):
        each = msgspec.structs.replace(drawn, number=number)
        told.append((router, each))
        once.take(router, [each], now=100.0 + number)
        for other, earlier in data.draw(st.lists(st.sampled_from(told), max_size=3)):
            aged = msgspec.structs.replace(earlier, age_s=float(number - earlier.number))
            assert not once.take(other, [aged], now=100.0 + number), "nothing new"
    last: dict[tuple[str, str], tuple[str, PairCheck]] = {each.pair: (router, each) for router, each in told}
    for router, each in data.draw(st.permutations([*last.values()])):
        again.take(router, [msgspec.structs.replace(each, age_s=float(len(told) - each.number))], now=500.0)
    reported = {(each.pair, each.number) for each in once.report(MEMBERS.get, 999.0)}
    senders = {source for source, target in last if target}
    assert reported == {
        (each.pair, each.number)
        for _, each in last.values()
        if each.target or each.source not in senders  # it was alone once
    }
    assert reported == {(each.pair, each.number) for each in again.report(MEMBERS.get, 999.0)}


def test_a_pair_is_out_of_use_until_a_later_check_finds_it_equal() -> None:
    desk = CheckDesk()
    assert not desk.take("r", [check(EQUAL)], now=0.0)
    assert desk.take("r", [check(DIFFERS, TRANSFERRED, number=2)], now=10.0)
    assert desk.suspects() == [Suspect("e1", "e2")]
    assert not desk.take("s", [check(UNFINISHED, number=7)], now=20.0), "an engine that failed says nothing"
    assert not desk.take("s", [check(EQUAL, number=8, age_s=25.0)], now=30.0), "older than what was found"
    assert desk.suspects() == [Suspect("e1", "e2")]
    assert desk.take("s", [check(EQUAL, number=9)], now=40.0)
    assert not desk.take("r", [check(DIFFERS, TRANSFERRED, number=2, age_s=31.0)], now=41.0), "told again"
    assert not desk.suspects()


def test_an_engine_that_does_not_agree_with_itself_is_out_of_use_with_all() -> None:
    desk = CheckDesk()
    assert desk.take("r", [check(DIFFERS, CACHED)], now=0.0)
    assert desk.suspects() == [Suspect("e1")]
    assert desk.take("r", [check(DIFFERS, TRANSFERRED, number=2, target="e3")], now=1.0)
    assert desk.suspects() == [Suspect("e1", "e3")], "with itself it agreed"
    assert desk.take("r", [check(EQUAL, number=3, target="e3")], now=2.0)
    assert not desk.suspects()


def test_what_can_be_checked_no_more_is_forgotten() -> None:
    desk = CheckDesk()
    desk.take("r", [check(DIFFERS, TRANSFERRED)], now=0.0)
    assert not desk.expire(MEMBERS.get, 1.0)
    gone = {name: info for name, info in MEMBERS.items() if name != "e2"}
    assert not desk.expire(gone.get, KEPT_S), "it may come back as it was"
    assert desk.report(gone.get, 2.0) == []
    assert desk.expire(gone.get, 2.0 + KEPT_S)
    desk.take("r", [check(DIFFERS, TRANSFERRED, number=2)], now=2 * KEPT_S)
    other = MEMBERS | {"e2": make_info("e2", numerics=Numerics("b"))}
    assert desk.expire(other.get, 2 * KEPT_S), "of another class it promises something else"


def test_a_report_names_those_that_differ_first_and_says_how_old_they_are() -> None:
    desk = CheckDesk()
    desk.take("r", [check(DIFFERS, TRANSFERRED, age_s=5.0)], now=10.0)
    desk.take("r", [check(EQUAL, number=2, target="e3")], now=11.0)
    first, second = desk.report(MEMBERS.get, 12.0)
    assert (first.target, first.age_s, first.router_id) == ("e2", 7.0, "r")
    assert (second.target, second.age_s) == ("e3", 1.0)


def test_what_is_remembered_and_told_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_PAIRS", 500)
    desk = CheckDesk()
    for number in range(600):
        desk.take("r", [check(EQUAL, number=number, target=f"x{number}")], now=float(number))
    told = desk.report(lambda _: MEMBERS["e1"], 600.0)
    assert len(told) == MAX_REPORTED
    assert told[0].target == "x599"
    assert len(desk._last) == 500
