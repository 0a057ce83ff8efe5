"""Outputs of vLLM in our words."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from microserve.services.engine.vllm.front.output import Output, finish_of, prompt_rows, token_logprobs

pytestmark = pytest.mark.slow


@dataclass
class Rated:
    """vLLM's ``Logprob``."""

    logprob: float
    rank: int | None


IN_TOP = {5: Rated(-1.0, 2), 9: Rated(-0.5, 1)}
"""The chosen token, which is second; vLLM says each token once."""
BEHIND = {5: Rated(-4.0, 7), 9: Rated(-0.5, 1), 8: Rated(-1.0, 2)}


def test_a_chosen_token_among_the_likeliest_stands_at_its_rank() -> None:
    (rated,) = token_logprobs([5], [IN_TOP], 2)
    assert rated.logprob == -1.0 and rated.top == [(9, -0.5), (5, -1.0)]


def test_one_behind_them_is_not_among_them() -> None:
    (rated,) = token_logprobs([5], [BEHIND], 2)
    assert rated.logprob == -4.0 and rated.top == [(9, -0.5), (8, -1.0)]


def test_the_chosen_one_alone() -> None:
    (rated,) = token_logprobs([5], [{5: Rated(-1.0, 2)}], 0)
    assert rated.logprob == -1.0 and rated.top == []


def test_none_where_none_were_asked_for() -> None:
    assert token_logprobs([5], None, None) == []


def test_rows_of_a_prompt_begin_behind_its_first_token() -> None:
    rows = prompt_rows([3, 5], [None, IN_TOP], 2)
    (row,) = list(rows)
    assert (rows.begin, row.rank) == (1, 2)
    assert row.logprob == pytest.approx(-1.0) and [each for each, _ in row.top] == [9, 5]


@pytest.mark.parametrize(
    ("output", "finish"),
    [
        (Output([4], finish="stop", stop=4), ("stop", 4)),
        (Output([4], finish="stop"), ("stop", 4)),
        (Output([4], finish="length"), ("length", None)),
        (Output([], finish="abort"), ("abort", None)),
    ],
)
def test_reasons(output: Output, finish: tuple[str, int | None]) -> None:
    assert finish_of(output) == finish
