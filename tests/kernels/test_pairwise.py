"""Cases for a GPU are chosen so that every two values meet."""

from __future__ import annotations

import itertools

import pytest

from tests.support.engine.device.pairwise import pairwise


@pytest.mark.parametrize("axes", [["ab", "cd"], ["abc", "defgh", "ijkl", "mno"], ["abc", "defgh", "ijkl"]])
def test_every_two_values_meet_and_in_few_cases(axes: list[str]) -> None:
    cases = pairwise(*axes)
    for (one, left), (other, right) in itertools.combinations(enumerate(axes), 2):
        met = {(case[one], case[other]) for case in cases}
        assert met == set(itertools.product(left, right))
    first, second = sorted(map(len, axes))[-2:]
    assert len(cases) <= 1.3 * first * second
