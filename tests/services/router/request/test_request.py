import pytest
from hypothesis import given
from hypothesis import strategies as st

from microserve.protocol.bus.codec import encode_tokens
from microserve.protocol.errors import InvalidInterval, ProtocolViolation
from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.services.router.request.request import Request


def make(num_tokens: int, block_size: int = 16) -> Request:
    return Request("r", list(range(num_tokens)), SamplingParams(), 1e9, block_size)


@given(st.integers(1, 300), st.integers(1, 64))
def test_num_block_tokens_is_whole_blocks_and_at_most_the_prompt(num_tokens: int, block_size: int) -> None:
    request = make(num_tokens, block_size)
    assert request.num_block_tokens % block_size == 0
    assert num_tokens - block_size < request.num_block_tokens <= num_tokens


@given(st.integers(1, 50), st.integers(-60, 60))
def test_bounds_count_from_both_ends(num_tokens: int, value: int) -> None:
    request = make(num_tokens)
    if -num_tokens <= value <= num_tokens:
        expected = value if value >= 0 else num_tokens + value
        assert request.bound("end", value) == expected
    else:
        with pytest.raises(InvalidInterval) as caught:
            request.bound("end", value)
        assert caught.value.field == "end"


def test_no_bound_is_the_prompts_end() -> None:
    assert make(7).bound("end", None) == 7


def test_the_frame_that_came_is_the_frame_that_goes() -> None:
    frame = encode_tokens([5, 6, 7])
    request = Request.from_frame("r", frame, SamplingParams(), deadline=1.0, block_size=16, salt="s")
    assert request.tokens == [5, 6, 7]
    assert request.token_frame is frame
    assert make(3).token_frame == encode_tokens([0, 1, 2])


def test_a_cut_frame_is_refused() -> None:
    with pytest.raises(ProtocolViolation):
        Request.from_frame("r", b"\0\0\0", SamplingParams(), deadline=1.0, block_size=16)
