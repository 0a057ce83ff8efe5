"""What is done to each value alone, to the bit: every variant against the class written again in numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microserve.kernels.cpu.library import library
from tests.support.kernels import cpu_class
from tests.support.kernels.cpu_class import Floats
from tests.support.kernels.family import bytes_of
from tests.support.kernels.family_step import ways

VARIANTS = sorted({variant for variant, _, _ in ways()})
FUNCTIONS = {"exp2": cpu_class.exp2, "bf16": cpu_class.round_bf16, "silu": cpu_class.silu}
SPECIAL = [
    *(0.0, -0.0, 1e-45, -1e-45, 1.1754942e-38, 2.0**-126, -(2.0**-126), 1.0, -1.0, 0.5, -0.5, 126.0, 127.0),
    *(-125.5, -126.0, -126.5, -127.0, -149.0, -1e30, 88.0, -88.0, 87.5, -87.5, math.inf, -math.inf, math.nan),
    *(3.38953139e38, -3.38953139e38, 1.00390625, 1.01171875, 65536.0, -1e-30),
]


def check(variant: str, function: str, values: Floats) -> None:
    padded = np.concatenate([values, np.zeros(-len(values) % 16, np.float32)])
    assert bytes_of(library().apply(variant, function, padded)) == bytes_of(FUNCTIONS[function](padded))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_special_values_ties_and_all_magnitudes(variant: str, function: str) -> None:
    check(variant, function, np.array(SPECIAL, np.float32))
    ties = (np.arange(0x3F800000, 0x3F900000, 0x1000) | 0x8000).astype(np.uint32).view(np.float32)
    check(variant, function, ties)
    random = np.random.default_rng(1)
    check(variant, function, (random.standard_normal(1 << 15) * 40).astype(np.float32))
    check(variant, function, (2.0 ** random.uniform(-126, 6, 1 << 14)).astype(np.float32))


@pytest.mark.parametrize("variant", VARIANTS)
@settings(deadline=None, max_examples=60)
@given(
    function=st.sampled_from(sorted(FUNCTIONS)),
    values=st.lists(st.floats(width=32, max_value=126.0), min_size=1, max_size=64),
)
def test_any_values(variant: str, function: str, values: list[float]) -> None:
    check(variant, function, np.array(values, np.float32))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_functions_are_the_ones_that_are_meant(variant: str) -> None:
    values = np.linspace(-30, 30, 1 << 14, dtype=np.float32)
    wide = values.astype(np.float64)
    for function, exact, error in (("exp2", 2.0**wide, 3e-7), ("silu", wide / (1 + np.exp(-wide)), 2e-6)):
        got = library().apply(variant, function, values)
        assert np.abs(got - exact).max() <= error * np.abs(exact).max()
        assert (np.abs(got - exact) <= error * np.abs(exact) + 1e-12).all()
    assert library().apply(variant, "exp2", np.zeros(16, np.float32)).tolist() == [1.0] * 16


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_bad_number_of_values_is_refused(function: str) -> None:
    with pytest.raises(ValueError, match="n, function"):
        library().apply("portable", function, np.zeros(15, np.float32))
