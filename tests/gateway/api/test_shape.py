"""The shape of a body is bounded before anything is built, by what is outside of its texts."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microserve.gateway.api import parse as parsing
from microserve.gateway.api.parse import Shape, check_shape, parse
from microserve.gateway.openai.schema import CompletionRequest
from microserve.protocol.errors import InvalidRequest

TRICKY = st.text(alphabet='a"\\,[]{}:\n', max_size=12)
JSON = st.recursive(
    st.none() | st.integers() | TRICKY,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TRICKY, inner, max_size=4),
    max_leaves=20,
)


def shape_of(value: Any) -> tuple[int, int]:
    """Containers and commas; depth."""
    if not isinstance(value, list | dict):
        return 0, 0
    inner = [shape_of(each) for each in (value.values() if isinstance(value, dict) else value)]
    values = 1 + max(0, len(inner) - 1) + sum(number for number, _ in inner)
    return values, 1 + max((depth for _, depth in inner), default=0)


@given(value=JSON, ascii_only=st.booleans(), slice_nbytes=st.integers(1, 40))
def test_values_and_depth_are_counted_exactly(value: Any, ascii_only: bool, slice_nbytes: int) -> None:
    body = json.dumps(value, ensure_ascii=ascii_only).encode()
    values, depth = shape_of(value)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parsing, "SLICE_NBYTES", slice_nbytes)
        check_shape(body, Shape(max(values, 0), max(depth, 0)))
        for tight in ([Shape(values - 1, depth)] if values else []) + (
            [Shape(values, depth - 1)] if depth else []
        ):
            with pytest.raises(InvalidRequest):
                check_shape(body, tight)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b'{"model":"m","prompt":' + b"[" * 100 + b"]" * 100 + b"}", "prompt"),
        (b'{"model":"m","prompt":"x","metadata":' + b'{"a":' * 100 + b"1" + b"}" * 100 + b"}", "metadata"),
        (b'{"model":"m","prompt":[' + b"1," * 2000 + b"1]}", "prompt"),
        (b'{"model":"m","unknown":[' + b"[]," * 2000 + b'[]],"prompt":"x"}', None),
    ],
)
def test_what_is_too_much_is_named(body: bytes, field: str | None) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(body, CompletionRequest, Shape(max_values=1000))
    assert field is None or caught.value.field == field


def test_texts_do_not_count() -> None:
    text = "a, [b], {c}: " * 5000
    body = json.dumps({"model": "m", "prompt": text}).encode()
    assert parse(body, CompletionRequest, Shape(max_values=10)).prompt == text


def test_where_it_is_wrong_is_found_in_one_look() -> None:
    """A broken text full of quotation marks: 64 KB of them, parsed in the loop, held it for 13 s."""
    body = b'{"model":"m","prompt":"' + rb"\"" * 200_000 + rb'\q"}'
    begun = time.thread_time()
    with pytest.raises(InvalidRequest) as caught:
        parse(body, CompletionRequest)
    assert caught.value.field == "prompt"
    assert time.thread_time() - begun < 10  # of CPU; it would be two minutes
