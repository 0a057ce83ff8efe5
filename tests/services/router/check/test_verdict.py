"""What equal means: bits of an exact class, tokens up to a tie of others."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from microserve.protocol.messages.check import BITS, TOKENS
from microserve.protocol.messages.engine import TokenLogprob
from microserve.services.router.check.verdict import Answer, first_difference

tokens = st.integers(0, 5)
logprobs = st.builds(
    TokenLogprob,
    st.floats(-20.0, 0.0, width=32),
    st.lists(st.tuples(tokens, st.floats(-20.0, 0.0, width=32)), max_size=3),
)


@st.composite
def answers(draw: st.DrawFn) -> Answer:
    told = draw(st.lists(st.tuples(tokens, logprobs), max_size=6))
    return Answer([token for token, _ in told], [each for _, each in told])


def answer(*token_ids: int, logprob: float = -0.5, top: list[tuple[int, float]] | None = None) -> Answer:
    return Answer([*token_ids], [TokenLogprob(logprob, top or []) for _ in token_ids])


@given(answers(), st.sampled_from([BITS, TOKENS]))
def test_an_answer_is_equal_to_itself(one: Answer, compared: str) -> None:
    again = Answer(list(one.token_ids), list(one.logprobs), num_computed=9)
    assert first_difference(one, again, compared) is None


@given(answers(), answers())
def test_bits_are_equal_only_where_all_is(one: Answer, other: Answer) -> None:
    is_equal = (one.token_ids, one.logprobs) == (other.token_ids, other.logprobs)
    found = first_difference(one, other, BITS)
    assert found == first_difference(other, one, BITS)
    if found is None:
        assert is_equal
    else:
        same = slice(0, found)
        assert one.token_ids[same] == other.token_ids[same]
        assert one.logprobs[same] == other.logprobs[same]


@given(answers(), answers())
def test_whoever_is_equal_in_bits_is_equal_in_tokens(one: Answer, other: Answer) -> None:
    assert first_difference(one, other, TOKENS) == first_difference(other, one, TOKENS)
    if first_difference(one, other, BITS) is None:
        assert first_difference(one, other, TOKENS) is None


def test_one_bit_of_a_log_probability_is_a_difference_of_an_exact_class() -> None:
    one, other = answer(1, 2, logprob=-0.5), answer(1, 2, logprob=-0.5000000000000001)
    assert first_difference(one, other, BITS) == 0
    assert first_difference(one, other, TOKENS) is None
    assert first_difference(answer(1, logprob=0.0), answer(1, logprob=-0.0), BITS) == 0


def test_another_token_is_a_difference_of_any_class() -> None:
    for compared in (BITS, TOKENS):
        assert first_difference(answer(1, 2, 3), answer(1, 9, 3), compared) == 1
        assert first_difference(answer(1, 2), answer(1, 2, 3), compared) == 2


def test_two_tokens_that_are_as_likely_may_change_places_where_no_bits_are_promised() -> None:
    near, far = [(2, -0.70), (9, -0.71)], [(2, -0.1), (9, -4.0)]
    assert first_difference(answer(2, 3, top=near), answer(9, 4, top=near), TOKENS) is None
    assert first_difference(answer(2, 3, top=near), answer(9, 4, top=near), BITS) == 0
    assert first_difference(answer(2, top=far), answer(9, top=far), TOKENS) == 0
