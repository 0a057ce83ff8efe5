"""Weights in int8, to the bit: products and steps of every variant against the class written in numpy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microserve.kernels.cpu.library import ELEMS, VARIANTS, choose_variant, library
from tests.kernels.cpu.test_product import KINDS, operands, widened
from tests.support.kernels import cpu_class
from tests.support.kernels.family import TinyModel, bytes_of, class_bytes, random_ids
from tests.support.kernels.family_step import Part, Room, Streams, variants, ways

WIDEST = 20
"""Blocks of 32 k: two stretches that are widened at a time, and a part of one."""


@pytest.mark.parametrize(("variant", "recipe", "elem"), ways())
@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_every_variant_multiplies_whole_numbers_and_scales_them_once(
    variant: str, recipe: str, elem: str, data: st.DataObject
) -> None:
    m, kind = data.draw(st.integers(1, 70), "rows"), data.draw(st.sampled_from(KINDS), "kind")
    n, k = (32 * data.draw(st.integers(1, most), name) for most, name in ((2, "columns"), (WIDEST, "depth")))
    a, b, c = operands(np.random.default_rng(data.draw(st.integers(0, 1 << 30), "seed")), elem, kind, m, n, k)
    if data.draw(st.booleans(), "a row of nothing"):
        b[3] = 0

    got = library().product(variant, a, b, c, recipe, "int8")

    expected = cpu_class.product_int8(recipe, c, a, b if elem == "float32" else widened(b))
    assert bytes_of(got) == bytes_of(expected)
    row = data.draw(st.integers(0, m - 1), "alone")
    alone = library().product(variant, a[row : row + 1], b, c[row : row + 1], recipe, "int8")
    assert bytes_of(alone) == bytes_of(got[row : row + 1])


def test_a_row_of_weights_that_is_broken_breaks_its_own_column() -> None:
    a, b, c = operands(np.random.default_rng(1), "float32", "ordinary", 3, 64, 64)
    whole = library().product("portable", a, b, c, weights="int8")
    for broken in (np.nan, np.inf, -np.inf):
        hurt = b.copy()
        hurt[9, 5] = broken
        got = library().product("portable", a, hurt, c, weights="int8")
        assert np.isnan(got[:, 9]).all()
        assert np.delete(got, 9, 1).tobytes() == np.delete(whole, 9, 1).tobytes()


@pytest.mark.parametrize(("recipe", "elem"), ELEMS)
@pytest.mark.parametrize("family", ["llama", "mistral", "biased"])
def test_steps_compute_what_the_class_says(family: str, recipe: str, elem: str) -> None:
    """Tied and not; heads of an odd number of tiles; biases and norms: whole, in chunks, token by token."""
    model, ids, table = TinyModel(family, elem, recipe, weights="int8"), random_ids(38), [5, 3, 8]
    kv, logits = model.sequence(ids, range(38))
    for variant in variants(elem, recipe):
        for edges in ([0, 38], [0, 17, 38], range(39)):
            room = Room(model, variant, threads=2)
            for start, end in itertools.pairwise(edges):
                assert room.run([Part(ids, start, end, table)]) == [bytes_of(logits[end - 1])], variant
            assert room.stored(table, 38) == class_bytes(kv, 38), variant
            room.close()


@pytest.mark.parametrize(("recipe", "elem"), ELEMS)
def test_a_row_has_the_same_bits_in_any_company(recipe: str, elem: str) -> None:
    """Wide enough for several stretches; rows of one sequence alone, and among others up to 80 of a step."""
    model = TinyModel("qwen3", elem, recipe, weights="int8")
    alone = Streams(Room(model, variants(elem, recipe)[-1]), 3)
    expected = np.concatenate([alone.run([(0, 1)]) for _ in range(60)])
    for variant in variants(elem, recipe)[1:]:
        streams = Streams(Room(model, variant, 2, bounds={"max_logits": 80}), 3)
        got = [streams.run([(1, 2), (0, 1)])[2:], streams.run([(0, 5), (2, 7)])[:5]]
        got += [streams.run([(1, 30), (0, 49)])[30:], streams.run([(0, 5)])]
        assert np.concatenate(got).tobytes() == expected.tobytes(), variant
        streams.room.close()
    alone.room.close()


def test_variants_are_held_against_the_portable_one_with_such_weights_too() -> None:
    best = choose_variant(library(), weights="int8")
    assert best == [name for name in VARIANTS if library().supports(name)][-1]
