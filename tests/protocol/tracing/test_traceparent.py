"""``traceparent``, read and written: whatever comes in, what goes out is a valid one or nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microserve.protocol.tracing.traceparent import TraceParent, make, parse, relayed

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
digits = st.sampled_from("0123456789abcdef")
trace_ids = st.text(digits, min_size=32, max_size=32).filter(lambda text: text.strip("0"))
span_ids = st.text(digits, min_size=16, max_size=16).filter(lambda text: text.strip("0"))


@pytest.mark.slow
@given(trace_ids, span_ids, st.booleans())
def test_what_is_written_is_read_back(trace_id: str, span_id: str, is_sampled: bool) -> None:
    parent = TraceParent(trace_id, span_id, is_sampled)
    assert parse(parent.text) == parse(parent.text.encode()) == parent


@pytest.mark.slow
@given(st.booleans())
def test_new_ones_are_valid_and_new(is_sampled: bool) -> None:
    one, other = make(is_sampled=is_sampled), make(is_sampled=is_sampled)
    assert parse(one.text) == one
    assert one.trace_id != other.trace_id
    child = one.child()
    assert (child.trace_id, child.is_sampled) == (one.trace_id, one.is_sampled)
    assert child.span_id != one.span_id
    assert parse(child.text) == child


@pytest.mark.slow
@given(st.binary(max_size=80) | st.text(max_size=80))
def test_any_bytes_may_come(junk: bytes | str) -> None:
    assert parse(junk) is None or len(junk) >= 55


@pytest.mark.slow
@given(st.data())
def test_one_wrong_character_makes_it_none(data: st.DataObject) -> None:
    text = f"00-{TRACE}-{SPAN}-01"
    at = data.draw(st.integers(0, len(text) - 1))
    wrong = data.draw(st.characters().filter(lambda c: c not in "0123456789abcdef-"))
    assert parse(text[:at] + wrong + text[at + 1 :]) is None


@pytest.mark.slow
@given(st.text(max_size=80))
def test_what_is_relayed_is_valid_or_nothing(text: str) -> None:
    assert relayed(text) == "" or parse(relayed(text)) is not None


@pytest.mark.parametrize(
    "text",
    [
        "",
        f"00-{TRACE}-{SPAN}",
        f"00-{TRACE}-{SPAN}-01-",
        f"00-{TRACE}-{SPAN}-01-more",
        f"00-{TRACE}-{SPAN}-01 ",
        f"00-{TRACE}-{SPAN}-01\n",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00_{TRACE}_{SPAN}_01",
        f"00-{TRACE}-{SPAN}-1",
        f"01-{TRACE}-{SPAN}-01more",
        f"01-{TRACE}-{SPAN}-01-" + "x" * 10_000,
        "\u0660" * 55,
    ],
)
def test_is_none(text: str) -> None:
    assert parse(text) is None
    assert parse(text.encode("utf-8")) is None
    assert relayed(text) == ""


@pytest.mark.parametrize("text", [f"01-{TRACE}-{SPAN}-01", f"cc-{TRACE}-{SPAN}-ff-what-comes-later"])
def test_a_later_version_is_read_as_far_as_it_is_known_and_written_as_ours(text: str) -> None:
    parent = parse(text)
    assert parent == TraceParent(TRACE, SPAN, is_sampled=True)
    assert relayed(text) == f"00-{TRACE}-{SPAN}-01"


def test_flags_that_nobody_knows_are_not_passed_on() -> None:
    assert relayed(f"00-{TRACE}-{SPAN}-fe") == f"00-{TRACE}-{SPAN}-00"
