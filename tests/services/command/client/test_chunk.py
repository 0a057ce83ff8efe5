"""Errors as servers write them, in a sentence."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microserve.services.command.client.chunk import MAX_ERROR_CHARS, error_in, read_chunk


@pytest.mark.parametrize(
    "body",
    [
        '{"error": {"message": "no such model", "type": "invalid_request_error"}}',
        '{"error": "no such model"}',
        '{"object": "error", "message": "no such model", "code": 404}',
        '{"detail": "no such model"}',
        '{"type": "error", "error": {"type": "not_found_error", "message": "no such\\n  model"}}',
        "no such model",
    ],
)
def test_the_sentence_is_found(body: str) -> None:
    assert error_in(body.encode()) == "no such model"


@given(st.binary(max_size=2000))
def test_whatever_a_refusal_holds_is_a_line(body: bytes) -> None:
    text = error_in(body)
    assert "\n" not in text and len(text) <= MAX_ERROR_CHARS + 3


def test_members_that_nobody_asks_for_are_passed_over() -> None:
    chunk = read_chunk(
        b'{"id":"x","choices":[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null}]}'
    )
    assert not chunk.choices[0].says_something
    with pytest.raises(ValueError):
        read_chunk(b'{"choices": 3}')
