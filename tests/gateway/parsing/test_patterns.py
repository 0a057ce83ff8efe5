"""Whether a pattern may be found in an empty text is known without trying it."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microserve.gateway.parsing.written.lark import Unwritable
from microserve.gateway.parsing.written.schema import least_chars, text_term

COUNTS = st.sampled_from(["", "?", "*", "+", "{0}", "{2}", "{0,2}", "{1,3}", "{,2}", "*?"])
PATTERNS = st.recursive(
    st.sampled_from(["a", "[ab]", r"\d", ".", ""]),
    lambda inner: (
        st.lists(inner, max_size=3).map("".join)
        | st.lists(inner, min_size=1, max_size=3).map("|".join)
        | st.tuples(inner, COUNTS).map(lambda both: f"(?:{both[0]}){both[1]}")
    ),
    max_leaves=8,
)


@given(inner=PATTERNS, begins=st.booleans(), ends=st.booleans())
def test_it_is_as_a_trial_would_say(inner: str, begins: bool, ends: bool) -> None:
    pattern = f"{'^' * begins}(?:{inner}){'$' * ends}"
    assert (least_chars(pattern) == 0) == (re.search(pattern, "") is not None)


@pytest.mark.parametrize("pattern", ["(" * 7 + "a?" + "){30}" * 7, "(a?|b?)" * 60 + "c"])
def test_no_trial_holds_a_gateway_up(pattern: str) -> None:
    """Where they were tried, these took centuries."""
    _, may_be_empty = text_term({"pattern": f"^{pattern}$"}, "</parameter>")
    assert may_be_empty == (not pattern.endswith("c"))


@pytest.mark.parametrize("pattern", ["(", "a{2,1}", "[b-a]", "(" * 3000 + ")" * 3000])
def test_what_is_no_pattern_cannot_be_kept(pattern: str) -> None:
    with pytest.raises(Unwritable):
        least_chars(pattern)
