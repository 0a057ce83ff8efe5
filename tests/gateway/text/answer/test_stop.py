"""Stop strings: the visible text depends on the text alone, never on its cuts."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microserve.gateway.text.answer.stop import StopMatcher

LETTERS = st.sampled_from("ab😀")
STOPS = st.lists(st.text(LETTERS, min_size=1, max_size=4), min_size=1, max_size=4)


def visible(text: str, stops: list[str]) -> tuple[str, bool]:
    """The rule itself: the first place where a stop string is complete, and the longest one there."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


def pieces_of(text: str, cuts: list[int]) -> list[str]:
    borders = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    return [text[a:b] for a, b in pairwise(borders)]


@given(text=st.text(LETTERS, max_size=40), stops=STOPS, cuts=st.lists(st.integers(0, 40)))
def test_any_cut_gives_the_same_visible_text(text: str, stops: list[str], cuts: list[int]) -> None:
    matcher = StopMatcher(stops)
    shown = ""
    expected, stopped = visible(text, stops)
    for piece in pieces_of(text, cuts):
        shown += matcher.push(piece)
        # What is out can never be taken back.
        assert expected.startswith(shown)
    if not matcher.stopped:
        shown += matcher.flush()
    assert (shown, matcher.stopped) == (expected, stopped)
    assert matcher.matched is None or (matcher.matched in stops and text.startswith(shown + matcher.matched))


@given(text=st.text(LETTERS, max_size=40), stops=STOPS)
def test_nothing_is_held_back_that_cannot_become_a_stop_string(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown = "".join(matcher.push(character) for character in text)
    if not matcher.stopped:
        held = text[len(shown) :]
        assert not held or any(stop.startswith(held) for stop in stops)


@pytest.mark.parametrize("stops", [["xab", "b"], ["b", "xab"]])
def test_of_stop_strings_that_end_together_the_longest_counts(stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    assert matcher.push("1xa") == "1"
    assert matcher.push("b") == ""
    assert matcher.matched == "xab"


@pytest.mark.parametrize("stops", [["abc", "b"], ["b", "abc"]])
def test_the_stop_string_that_is_complete_first_counts(stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    assert (matcher.push("abc"), matcher.matched) == ("a", "b")


def test_text_after_the_match_is_swallowed() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.push("one EN") == "one "
    assert matcher.push("Dtwo") == ""
    assert matcher.stopped
    assert matcher.push("three") == ""


def test_a_prefix_that_turns_out_wrong_is_shown() -> None:
    matcher = StopMatcher(["\n\nUser:"])
    assert matcher.push("a\n\nUse") == "a"
    assert matcher.push("d") == "\n\nUsed"
    assert matcher.flush() == ""
