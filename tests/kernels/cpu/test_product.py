"""The product of the class, to the bit: every variant against the class written again in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microserve.kernels.cpu.library import library
from tests.support.kernels import cpu_class
from tests.support.kernels.cpu_class import Floats
from tests.support.kernels.family import bytes_of
from tests.support.kernels.family_step import ways

SPECIAL = np.array(
    [0.0, -0.0, 1e-45, -1e-40, 2.0**-126, -(2.0**-126), 1.0, -1.0, 2.0**127, -3.4e38], np.float32
)
BROKEN = (np.nan, np.inf, -np.inf)
KINDS = ("ordinary", "underflow", "overflow", "all magnitudes", "special")


def values(random: np.random.Generator, kind: str, *shape: int) -> Floats:
    ordinary = random.standard_normal(shape)
    if kind == "special":
        return random.choice(SPECIAL, shape)
    exponents = {
        "ordinary": np.zeros(shape),
        "underflow": random.uniform(-75, -55, shape),  # products about the smallest normal number
        "overflow": random.uniform(55, 66, shape),
        "all magnitudes": random.uniform(-126, 126, shape),
    }[kind]
    return (ordinary * 2.0**exponents).astype(np.float32)


def as_bf16(numbers: Floats) -> npt.NDArray[np.uint16]:
    return (cpu_class.round_bf16(numbers).view(np.uint32) >> 16).astype(np.uint16).reshape(numbers.shape)


def widened(halves: npt.NDArray[np.uint16]) -> Floats:
    return (halves.astype(np.uint32) << 16).view(np.float32)


def operands(
    random: np.random.Generator, elem: str, kind: str, m: int, n: int, k: int
) -> tuple[Any, Any, Floats]:
    a, b, c = values(random, kind, m, k), values(random, kind, n, k), values(random, kind, m, n)
    if elem == "float32":
        return a, b, c
    return widened(as_bf16(a)), as_bf16(b), c


@pytest.mark.parametrize(("variant", "recipe", "elem"), ways())
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_every_variant_computes_the_product_of_the_class(
    variant: str, recipe: str, elem: str, data: st.DataObject
) -> None:
    m, kind = data.draw(st.integers(1, 70), "rows"), data.draw(st.sampled_from(KINDS), "kind")
    n, k = (
        32 * data.draw(st.integers(1, most), name) for most, name in ((3, "columns / 32"), (5, "depth / 32"))
    )
    a, b, c = operands(np.random.default_rng(data.draw(st.integers(0, 1 << 30), "seed")), elem, kind, m, n, k)

    got = library().product(variant, a, b, c, recipe)

    expected = cpu_class.product(recipe, c, a, b if elem == "float32" else widened(b))
    assert bytes_of(got) == bytes_of(expected)


@pytest.mark.parametrize(("variant", "recipe", "elem"), ways())
@settings(deadline=None, max_examples=30)
@given(rows=st.integers(2, 70), seed=st.integers(0, 1 << 30), broken=st.sampled_from(BROKEN))
def test_a_row_that_is_broken_breaks_itself_alone(
    variant: str, recipe: str, elem: str, rows: int, seed: int, broken: float
) -> None:
    random = np.random.default_rng(seed)
    a, b, c = operands(random, elem, "ordinary", rows, 64, 96)
    row = int(random.integers(rows))
    whole = library().product(variant, a, b, c, recipe)
    a[row, random.integers(96)] = broken

    got = library().product(variant, a, b, c, recipe)

    assert not np.isfinite(got[row]).any()
    others = np.arange(rows) != row
    assert got[others].tobytes() == whole[others].tobytes()


@pytest.mark.parametrize(("variant", "recipe", "elem"), ways())
def test_a_row_has_the_same_bits_in_any_company(variant: str, recipe: str, elem: str) -> None:
    a, b, c = operands(np.random.default_rng(3), elem, "ordinary", 67, 160, 128)
    whole = library().product(variant, a, b, c, recipe)
    order = np.random.default_rng(4).permutation(67)
    assert library().product(variant, a[order], b, c[order], recipe).tobytes() == whole[order].tobytes()
    for row in range(67):
        alone = library().product(variant, a[row : row + 1], b, c[row : row + 1], recipe)
        assert alone.tobytes() == whole[row].tobytes()


def test_the_account_of_an_fma_is_the_exact_one() -> None:
    """The numpy model's FMA against integers of any length, where rounding twice would differ."""
    from fractions import Fraction

    random = np.random.default_rng(7)
    a, b, c = (values(random, "ordinary", 20_000) for _ in range(3))
    # Ties of the sum, and a little more or less than one.
    c[:10_000] = np.float32(2.0) ** random.integers(20, 30, 10_000) * np.sign(c[:10_000])
    got = cpu_class.fma(a, b, c)
    for x, y, z, r in zip(*(each.tolist() for each in (a, b, c, got)), strict=True):
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        here = abs(exact - Fraction(r))
        for other in (np.nextafter(np.float32(r), np.float32(side)) for side in (-np.inf, np.inf)):
            there = abs(exact - Fraction(float(other)))
            is_even = int(np.float32(r).view(np.uint32)) % 2 == 0
            assert here < there or (here == there and is_even)
