"""Which variant serves: the best of the dtype, and none that computes other bits than the portable one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from microserve.kernels.cpu.library import VARIANTS, Library, choose_variant, is_right, library
from microserve.kernels.kernel_cache import KernelUnavailable

Product = Callable[..., npt.NDArray[np.float32]]


def swapped(pairs: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The two of each pair change places."""
    return np.ascontiguousarray(pairs.reshape(len(pairs), -1, 2)[:, :, ::-1].reshape(pairs.shape))


def even_one_first(product: Product, variant: str, a: Any, b: Any, c: Any, recipe: str) -> Any:
    return product(variant, swapped(a), swapped(b), c, recipe)


def denormals_kept(product: Product, variant: str, a: Any, b: Any, c: Any, recipe: str) -> Any:
    """What is added to is not flushed where nothing is added."""
    made = product(variant, a, b, c, recipe)
    return np.where((made == 0.0) & (c.view(np.int32) & 0x7FFFFF != 0), c, made)


def infinities_clamped(product: Product, variant: str, a: Any, b: Any, c: Any, recipe: str) -> Any:
    return np.clip(product(variant, a, b, c, recipe), np.float32(-3.4e38), np.float32(3.4e38))


class OtherCpu(Library):
    """This one, but for one instruction."""

    def __init__(self, variant: str, computes: Callable[..., Any]) -> None:
        self.__dict__ |= library().__dict__
        self._variant, self._computes = variant, computes

    def recipes(self, variant: str, dtype: str = "bfloat16") -> list[str]:
        known = super().recipes(variant, dtype)
        # Where there is no such instruction, the portable variant's account of it takes its place.
        return known or (["cpu2"] if (variant, dtype) == (self._variant, "bfloat16") else [])

    def product(self, variant: str, *given: Any) -> npt.NDArray[np.float32]:
        if variant != self._variant:
            return super().product(variant, *given)
        *operands, weights = given
        assert weights == "dtype"
        return self._computes(super().product, "portable", *operands)  # type: ignore[no-any-return]


@pytest.mark.parametrize("computes", [even_one_first, denormals_kept, infinities_clamped])
def test_a_cpu_that_multiplies_pairs_otherwise_is_not_of_the_class(computes: Callable[..., Any]) -> None:
    other = OtherCpu("avx512bf16", computes)
    assert not is_right(other, "avx512bf16")
    assert choose_variant(other) != "avx512bf16"
    with pytest.raises(KernelUnavailable, match="computes other bits here"):
        choose_variant(other, "avx512bf16")


def test_the_best_of_a_dtype_serves() -> None:
    for dtype in ("bfloat16", "float32"):
        usable = [name for name in VARIANTS if library().supports(name, dtype)]
        assert choose_variant(library(), "auto", dtype) == usable[-1]
    assert choose_variant(library(), "auto", "float32") != "avx512bf16"


def test_fp32_has_no_pairs() -> None:
    with pytest.raises(KernelUnavailable, match="avx512bf16: it has portable"):
        choose_variant(library(), "avx512bf16", "float32")
    with pytest.raises(ValueError, match="does not compute float32"):
        library().elem("portable", "float32", "cpu2")
