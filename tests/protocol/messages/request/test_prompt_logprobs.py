"""Rows of a prompt's log-probabilities: whatever they are cut into, they are the same rows."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microserve.protocol.messages.request.prompt_logprobs import (
    PromptLogprob,
    PromptLogprobs,
    packed,
    row_nbytes,
)

FLOATS = st.floats(width=32, allow_nan=False)
IDS = st.integers(0, 2**32 - 1)


@st.composite
def rows(draw: st.DrawFn) -> tuple[int, list[PromptLogprob]]:
    num_top = draw(st.integers(0, 3))
    row = st.builds(
        PromptLogprob,
        FLOATS,
        st.integers(1, 2**32 - 1),
        st.tuples(*[st.tuples(IDS, FLOATS)] * num_top),
    )
    return num_top, draw(st.lists(row, max_size=8))


@given(rows(), st.integers(1, 9), st.integers(0, 20))
def test_what_is_packed_cut_and_joined_is_the_same(
    given_rows: tuple[int, list[PromptLogprob]], begin: int, position: int
) -> None:
    num_top, each = given_rows
    whole = packed(begin, num_top, each)

    assert list(whole) == each
    assert whole.is_whole and whole.end == begin + len(each) and len(whole) == len(each)
    head, tail = whole.until(position), whole.behind(position)
    kept = max(0, position - begin)
    assert list(head) == each[:kept] and list(tail) == each[kept:]
    assert head.joined(tail) == whole


def test_a_row_is_what_the_specification_says() -> None:
    told = packed(5, 2, [PromptLogprob(-0.5, 3, ((7, -0.25), (9, -1.5)))])

    assert told.rows == struct.pack("<fIIfIf", -0.5, 3, 7, -0.25, 9, -1.5)
    assert row_nbytes(2) == len(told.rows)


@pytest.mark.parametrize(
    "torn",
    [
        PromptLogprobs(0, 0, b""),
        PromptLogprobs(1, 0, b"1234567"),
        PromptLogprobs(1, -1, b""),
        PromptLogprobs(1, 1, b"12345678"),
    ],
)
def test_what_cannot_be_rows_is_seen(torn: PromptLogprobs) -> None:
    assert not torn.is_whole


@pytest.mark.parametrize("later", [PromptLogprobs(3, 0, bytes(8)), PromptLogprobs(2, 1, bytes(16))])
def test_only_what_follows_is_joined(later: PromptLogprobs) -> None:
    with pytest.raises(ValueError, match="do not follow"):
        PromptLogprobs(1, 0, bytes(8)).joined(later)
