"""The AMX variant by emulated intrinsics, on machines without AMX: its bits are the portable variant's.

Of products, and of whole steps over a pool full of NaN.
"""

from __future__ import annotations

import itertools
import platform
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from microserve.kernels.cpu.compiler import X86
from microserve.kernels.cpu.library import WEIGHTS, Library, is_right
from tests.support.kernels.amx import compare, emulated_library, streams
from tests.support.kernels.family import TILED, Family, TinyModel, bytes_of, class_bytes, random_ids
from tests.support.kernels.family_step import Part, Room

pytestmark = pytest.mark.skipif(platform.machine() not in X86, reason="AMX is of x86")


@pytest.fixture(scope="session")
def emulated() -> Library:
    return emulated_library()


def rounded(found: Library, values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """To bf16 and back."""
    return found.apply("portable", "bf16", values.reshape(-1)).reshape(values.shape)


def halves(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    return (values.view(np.uint32) >> 16).astype(np.uint16)


@settings(max_examples=60, deadline=None)
@example(rows=1, columns=1, blocks=1, exponents=0, seed=0, weights="dtype")
@example(rows=16, columns=3, blocks=2, exponents=0, seed=0, weights="dtype")
@example(rows=17, columns=2, blocks=2, exponents=0, seed=0, weights="dtype")
@example(rows=48, columns=2, blocks=2, exponents=0, seed=0, weights="dtype")
@example(rows=33, columns=3, blocks=19, exponents=0, seed=0, weights="int8")
@example(rows=49, columns=3, blocks=1, exponents=60, seed=0, weights="dtype")
@given(
    rows=st.integers(1, 100),
    columns=st.integers(1, 5),
    blocks=st.one_of(st.integers(1, 6), st.just(19)),
    exponents=st.sampled_from([0, 10, 60, 120]),
    seed=st.integers(0, 2**32 - 1),
    weights=st.sampled_from(WEIGHTS),
)
def test_products_of_every_shape(
    emulated: Library, rows: int, columns: int, blocks: int, exponents: int, seed: int, weights: str
) -> None:
    """Of ordinary values, and of such as underflow: what is tiny is zero for all variants."""
    random = np.random.default_rng(seed)

    def values(*shape: int) -> npt.NDArray[np.float32]:
        scale = np.exp2(random.integers(-exponents, 6, shape, endpoint=True)).astype(np.float32)
        return random.standard_normal(shape, np.float32) * scale

    a, b = rounded(emulated, values(rows, 32 * blocks)), rounded(emulated, values(32 * columns, 32 * blocks))
    a.reshape(-1)[:: 1 + seed % 29] = -0.0
    c = values(rows, 32 * columns)
    expected = emulated.product("portable", a, halves(b), c, weights=weights)
    assert emulated.product("amx", a, halves(b), c, weights=weights).tobytes() == expected.tobytes()


def test_it_is_right_where_it_is_emulated(emulated: Library) -> None:
    assert emulated.supports("amx")
    assert is_right(emulated, "amx") and is_right(emulated, "amx", "int8")


@st.composite
def families(draw: st.DrawFn) -> Family:
    num_kv_heads, with_biases = draw(st.integers(1, 2)), draw(st.booleans())
    return Family(
        draw(st.sampled_from([1, 2, 3, 4, 8, 17])) * num_kv_heads,
        num_kv_heads,
        head_dim=draw(st.sampled_from([32, 64, 64, 128, 48, 16])),
        hidden=draw(st.sampled_from([32, 64, 72])),
        intermediate=draw(st.sampled_from([32, 96, 80])),
        biases="qkvo" if with_biases else "",
        head_norms=with_biases,
        windows=(draw(st.sampled_from([None, None, 40])),) * 2,
        block_size=draw(st.sampled_from([16, 16, 32, 5])),
    )


models = st.builds(TinyModel, families(), seed=st.integers(0, 2**16))
spans = st.lists(
    st.tuples(st.integers(0, 2), st.sampled_from([1, 1, 2, 15, 16, 17, 33, 50])),
    min_size=1,
    max_size=3,
    unique_by=lambda span: span[0],
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(model=models, steps=st.lists(spans, min_size=1, max_size=5), threads=st.sampled_from([1, 2]))
def test_steps_of_any_rows(
    emulated: Library, model: TinyModel, steps: list[list[tuple[int, int]]], threads: int
) -> None:
    compare(emulated, model, steps, threads)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("head_dim", [32, 64])
def test_contexts_of_several_segments(emulated: Library, head_dim: int, threads: int) -> None:
    """Chunks that end within segments and at their borders, rows decoded between them."""
    steps = [
        [(0, 100)],
        [(0, 156)],
        [(0, 1), (1, 150)],
        [(1, 107), (0, 1)],
        [(0, 1), (1, 1)],
        [(0, 40), (1, 3)],
    ]
    compare(emulated, TinyModel(replace(TILED, head_dim=head_dim)), steps, threads)


def test_steps_with_weights_in_int8(emulated: Library) -> None:
    compare(emulated, TinyModel(TILED, weights="int8"), [[(0, 37)], [(0, 1), (1, 60)], [(0, 1), (1, 1)]], 2)


@pytest.mark.parametrize("head_dim", [32, 64])
def test_chunks_give_the_bits_of_a_whole_prefill(emulated: Library, head_dim: int) -> None:
    model = TinyModel(replace(TILED, head_dim=head_dim))
    whole = streams(emulated, "amx", model, 1)
    logits = whole.run([(0, 280)])
    for counts in ([100, 100, 80], [256, 24], [17, 1, 1, 33, 200, 28]):
        chunked = streams(emulated, "amx", model, 1, 2)
        got = np.concatenate([chunked.run([(0, count)]) for count in counts])
        assert got.tobytes() == logits.tobytes()
        assert chunked.room.whole_pool() == whole.room.whole_pool()
        chunked.room.close()
    whole.room.close()


@pytest.mark.parametrize("family", ["qwen3", "smollm3", "mistral", "llama"])
def test_it_computes_what_the_class_says(emulated: Library, family: str) -> None:
    """The class written again in numpy; heads of 64 in tiles, and such as tiles do not divide."""
    model, ids, table = TinyModel(family), random_ids(38), [5, 3, 8]
    kv, logits = model.sequence(ids, range(38))
    for edges in ([0, 38], [0, 17, 38], range(39)):
        room = Room(model, "amx", found=emulated)
        for start, end in itertools.pairwise(edges):
            got = room.run([Part(ids, start, end, table)])
            assert got == [bytes_of(logits[end - 1])]
        assert room.stored(table, 38) == class_bytes(kv, 38)
        room.close()


def test_fp32_takes_the_way_of_the_others(emulated: Library) -> None:
    compare(emulated, TinyModel(TILED, "float32"), [[(0, 37)], [(0, 1), (1, 60)]], 2)
