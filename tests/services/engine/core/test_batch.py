"""A view of tokens is the slice that it stands for, also when the list has grown since."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microserve.services.engine.core.batch import TokenView


@given(token_ids=st.lists(st.integers(0, 9), max_size=12), places=st.data())
def test_a_view_is_the_slice(token_ids: list[int], places: st.DataObject) -> None:
    begin = places.draw(st.integers(0, len(token_ids)))
    end = places.draw(st.integers(begin, len(token_ids)))
    view, want = TokenView(token_ids, begin, end), token_ids[begin:end]
    token_ids.append(7)

    assert list(view) == want
    assert (len(view), bool(view), 7 in view) == (len(want), bool(want), 7 in want)
    assert view[1:-1] == want[1:-1]
    assert view[::-1] == want[::-1]
    for index in range(-len(want), len(want)):
        assert view[index] == want[index]
    with pytest.raises(IndexError):
        view[len(want)]
