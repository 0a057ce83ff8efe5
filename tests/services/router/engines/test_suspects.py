"""Who exchanges no KV: by what the index says, by what was found here, and while the index is new."""

from __future__ import annotations

from itertools import permutations

from hypothesis import given
from hypothesis import strategies as st

from microserve.protocol.messages.check import (
    CACHED,
    DIFFERS,
    EQUAL,
    TRANSFERRED,
    UNFINISHED,
    PairCheck,
    Suspect,
)
from microserve.services.router.engines.suspects import PATIENCE_S, Suspects

ENGINES = ["a", "b", "c"]
pairs = st.sampled_from([*permutations(ENGINES, 2)])
marks = st.one_of(pairs, st.tuples(st.sampled_from(ENGINES), st.just("")))


def check(source: str, target: str, outcome: str, differs: str = "") -> PairCheck:
    return PairCheck(source, target, outcome, differs)


def barred(suspects: Suspects) -> set[tuple[str, str]]:
    return {(each, to) for each in ENGINES for to in suspects.targets_of(each, ENGINES)}


def listed(suspects: Suspects, *told: tuple[str, str], now: float = 0.0, is_first: bool = False) -> None:
    suspects.take([Suspect(*each) for each in told], now, is_first=is_first, knows=True)


@given(st.sets(marks))
def test_what_the_index_lists_is_barred_and_no_more(told: set[tuple[str, str]]) -> None:
    suspects = Suspects()
    listed(suspects, *told)
    wanted = {pair for pair in permutations(ENGINES, 2) if pair in told}
    wanted |= {(source, source) for source, _ in told}
    for engine, target in told:
        if not target:
            wanted |= {pair for pair in permutations(ENGINES, 2) if engine in pair}
    assert barred(suspects) == wanted
    listed(suspects)
    assert not barred(suspects)
    assert not suspects


@given(st.lists(st.tuples(pairs, st.sampled_from([EQUAL, UNFINISHED, CACHED, TRANSFERRED])), max_size=12))
def test_the_last_finding_counts(found: list[tuple[tuple[str, str], str]]) -> None:
    suspects = Suspects()
    wanted: set[tuple[str, str]] = set()
    for (source, target), what in found:
        outcome = what if what in (EQUAL, UNFINISHED) else DIFFERS
        new, back = suspects.found(check(source, target, outcome, what), now=1.0)
        before = set(wanted)
        if what == CACHED:
            wanted |= {(source, "")}
        elif what == TRANSFERRED:
            wanted = wanted - {(source, "")} | {(source, target)}
        elif what == EQUAL:
            wanted -= {(source, ""), (source, target)}
        assert (set(new), set(back)) == (wanted - before, before - wanted)
        assert suspects.pairs == wanted


def test_an_own_finding_counts_until_the_index_has_spoken() -> None:
    suspects = Suspects()
    suspects.found(check("a", "b", DIFFERS, TRANSFERRED), now=0.0)
    listed(suspects, now=1.0)
    assert barred(suspects) == {("a", "b"), ("a", "a")}, "it has not heard of it yet"
    listed(suspects, ("a", "b"), now=2.0)
    listed(suspects, now=3.0)
    assert not barred(suspects), "another router found them equal"


def test_an_index_that_knows_of_no_checks_takes_nothing_back() -> None:
    suspects = Suspects()
    suspects.found(check("a", "b", DIFFERS, TRANSFERRED), now=0.0)
    suspects.take([], 10 * PATIENCE_S, is_first=False, knows=False)
    assert barred(suspects) == {("a", "b"), ("a", "a")}
    suspects.found(check("a", "b", EQUAL), now=0.0)
    assert not barred(suspects)


def test_a_new_life_of_the_index_takes_nothing_back_for_a_while() -> None:
    suspects = Suspects()
    listed(suspects, ("a", "b"), ("c", ""))
    listed(suspects, is_first=True, now=1.0)
    assert suspects.pairs == {("a", "b"), ("c", "")}
    suspects.found(check("c", "a", EQUAL), now=2.0)
    assert suspects.pairs == {("a", "b")}, "what is found here counts at once"
    listed(suspects, now=1.0 + PATIENCE_S)
    assert not suspects
