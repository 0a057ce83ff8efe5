"""What several classes come to, and what can be a class at all."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from microserve.protocol.messages.numerics import (
    MAX_NUMERICS_CHARS,
    MIXED,
    NONE,
    UNKNOWN,
    Numerics,
    fault_of_numerics,
)

A, B = Numerics("a", is_exact=True), Numerics("b", is_exact=True)
CLASSES = st.lists(
    st.sampled_from([A, B, Numerics("a"), Numerics("c"), UNKNOWN, Numerics(MIXED)]), min_size=1
)


@given(CLASSES)
def test_all_of_one_class_is_of_it_and_anything_else_promises_nothing(parts: list[Numerics]) -> None:
    joint = parts[0]
    for part in parts[1:]:
        joint = joint.joined(part)

    assert joint.is_exact == (set(parts) in ({A}, {B}))
    assert joint.promise == (parts[0].name if joint.is_exact else NONE)
    if len({part.name for part in parts}) > 1:
        assert joint.name == MIXED


@given(CLASSES)
def test_the_order_does_not_matter(parts: list[Numerics]) -> None:
    def joint(of: list[Numerics]) -> Numerics:
        first, *rest = of
        for part in rest:
            first = first.joined(part)
        return first

    assert joint(parts) == joint(parts[::-1])


@pytest.mark.parametrize("name", ["cpu1-bf16-3f2a9c", "x" * MAX_NUMERICS_CHARS, "torch2.13.0-cpu_1+2"])
def test_names(name: str) -> None:
    assert not fault_of_numerics(Numerics(name)) and not fault_of_numerics(Numerics(name, is_exact=True))


@pytest.mark.parametrize("name", [MIXED, NONE, "a b", "a,b", "é", "a\r\n", "x" * (MAX_NUMERICS_CHARS + 1)])
def test_what_is_no_name(name: str) -> None:
    assert fault_of_numerics(Numerics(name))


def test_one_that_is_not_said_promises_nothing() -> None:
    assert not fault_of_numerics(UNKNOWN) and UNKNOWN.promise == NONE
    assert fault_of_numerics(Numerics(is_exact=True)) and Numerics(is_exact=True).promise == NONE
