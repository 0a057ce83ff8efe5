from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microserve.kvcache.codec.codec import Codec, decode, header
from microserve.kvcache.codec.frame import HEADER_NBYTES
from microserve.kvcache.codec.profile import LOSSLESS, NONE, Levels, Profile
from microserve.kvcache.codec.steps import transform
from microserve.protocol.messages.kv.geometry import Geometry
from tests.support.kvcache.codec import Bytes, geometry, profiles, random_rows, scores, to_floats, to_rows

pytestmark = pytest.mark.usefixtures("way")
DTYPES = ("float32", "bfloat16", "float16")
ROOM = 4096


def through(codec: Codec, of: Geometry, rows: Bytes, layer: int = 1) -> tuple[Bytes, int]:
    """Encoded and decoded; and the payload's bytes."""
    around = np.full(rows.nbytes * 2 + ROOM, 0xAA, np.uint8)
    out = around[64:-64]
    nbytes = codec.encode(layer, rows[0], rows[1], out)
    assert nbytes is not None and (around[:64] == 0xAA).all() and (around[-64:] == 0xAA).all()
    made = np.zeros_like(rows)
    told = decode(out[:nbytes], layer, of, made[0], made[1])
    assert told == header(out[:HEADER_NBYTES]) and told.nbytes == nbytes
    return made, nbytes


def error_and_bound(profile: Profile, of: Geometry, rows: Bytes) -> tuple[np.ndarray, np.ndarray]:
    """|x - x'| and the half of the scale that its group may have at most: from the raw numbers alone."""
    made, _ = through(Codec(profile, of, head_scores=scores(of)), of, rows)
    shape = (2, rows.shape[1], of.num_kv_heads, of.head_dim)
    before, after = (
        np.stack([to_floats(half, of.dtype) for half in each]).reshape(shape) for each in (rows, made)
    )
    return np.abs(before - after), before


@given(
    dtype=st.sampled_from(DTYPES),
    tokens=st.integers(1, 40),
    heads=st.integers(1, 4),
    dim=st.sampled_from((1, 2, 8, 12, 31)),
    counts=st.tuples(st.integers(2, 256), st.integers(2, 256)),
    coder=st.sampled_from(("none", "pack", "zstd", "rans")),
    scale=st.sampled_from((1e-6, 1e-3, 1.0, 1e3)),
    seed=st.integers(0, 1 << 16),
)
def test_an_element_is_off_by_half_a_step_at_most(
    dtype: str,
    tokens: int,
    heads: int,
    dim: int,
    counts: tuple[int, int],
    coder: str,
    scale: float,
    seed: int,
) -> None:
    of = geometry(dtype, heads, dim)
    rows = random_rows(of, tokens, seed, scale)
    profile = Profile(
        "it", quantiser="uniform", keys=Levels(counts[0]), values=Levels(counts[1]), coder=coder
    )
    off, before = error_and_bound(profile, of, rows)
    for half, axis in ((0, 0), (1, (1, 2))):
        numbers = before[half].astype(np.float64)
        least, greatest = numbers.min(axis=axis, keepdims=True), numbers.max(axis=axis, keepdims=True)
        # Least is kept as float16, rounded down by a step of it at most; so is scale, rounded up.
        slack16 = np.maximum(np.abs(least) / 1024, 2.0**-24)
        step = (greatest - least + slack16) / (counts[half] - 1)
        step = step + np.maximum(step / 1024, 2.0**-24)
        own = np.abs(numbers).max() * {"float32": 2.0**-20, "bfloat16": 2.0**-7, "float16": 2.0**-10}[dtype]
        assert (off[half] <= step / 2 + own + 2.0**-24).all()


@given(
    dtype=st.sampled_from(DTYPES),
    tokens=st.integers(1, 33),
    width=st.integers(0, 40),
    coder=st.sampled_from(("none", "zstd", "rans")),
    data=st.data(),
)
def test_an_exact_profile_gives_every_bit_back(
    dtype: str, tokens: int, width: int, coder: str, data: st.DataObject
) -> None:
    """Any bits, no numbers among them; rows of any width, values of none."""
    of = geometry(dtype)
    item = 4 if dtype == "float32" else 2
    raw = np.random.default_rng(data.draw(st.integers(0, 1 << 32))).integers(
        0, data.draw(st.sampled_from((1, 3, 256))), (tokens, (width + 1) * item), np.uint8
    )
    keys, values = raw[:, : item * (1 + width // 2)], raw[:, item * (1 + width // 2) :]
    out = np.empty(raw.nbytes + ROOM, np.uint8)
    nbytes = Codec(Profile("it", coder=coder), of).encode(3, keys, values, out)
    made = np.zeros_like(raw)
    split = keys.shape[1]
    told = decode(out[:nbytes], 3, of, made[:, :split], made[:, split:])
    assert (made == raw).all() and not told.is_lossy and told.raw_nbytes == raw.nbytes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("profile", profiles(), ids=lambda each: each.name)
def test_every_profile_makes_fewer_bytes_of_kv(profile: Profile, dtype: str) -> None:
    of = geometry(dtype, dim=64)
    rows = random_rows(of, 64)
    made, nbytes = through(Codec(profile, of, head_scores=scores(of)), of, rows)
    if profile.is_lossy:
        off = np.linalg.norm(to_floats(made, dtype) - to_floats(rows, dtype))
        assert off < 0.3 * np.linalg.norm(to_floats(rows, dtype))
    else:
        assert (made == rows).all()
    assert nbytes < rows.nbytes or profile == NONE or profile.coder == "none"


@given(dim=st.integers(1, 200), seed=st.integers(0, 1 << 32 - 1), layer=st.integers(0, 90))
def test_a_rotation_keeps_lengths_and_can_be_undone(dim: int, seed: int, layer: int) -> None:
    heads = np.random.default_rng(seed).standard_normal((3, 5, dim)).astype(np.float32)
    signs = transform.signs(seed & 0xFFFFFFFF, layer, 3, dim)
    turned = transform.rotate(heads, signs)
    assert np.allclose(np.linalg.norm(turned, axis=-1), np.linalg.norm(heads, axis=-1), rtol=1e-4)
    back = transform.rotate_back(turned, signs)
    assert np.linalg.norm(back - heads) <= 1e-3 * np.linalg.norm(heads)


def test_the_parts_of_a_head_are_powers_of_two_the_largest_first() -> None:
    assert transform.parts(64) == [64]
    assert transform.parts(96) == [64, 32]
    assert transform.parts(80) == [64, 16]
    assert transform.parts(7) == [4, 2, 1]


def test_signs_are_as_often_one_as_the_other_and_each_heads_own() -> None:
    signs = transform.signs(transform.SEED, 2, 8, 128)
    assert abs(float(signs.mean())) < 0.1
    assert len({head.tobytes() for head in signs}) == 8
    assert not np.array_equal(signs, transform.signs(transform.SEED, 3, 8, 128))


def test_a_rotation_pays_where_one_channel_stands_out() -> None:
    """Of values, which share a scale: an outlier takes the levels of all others."""
    of = geometry("float32", heads=1, dim=64)
    rows = random_rows(of, 64)
    numbers = to_floats(rows[1], "float32")
    numbers[:, 5] *= 50
    rows[1] = to_rows(numbers, "float32")
    off = {}
    for name in ("none", "hadamard"):
        profile = Profile("it", name, "uniform", Levels(16), Levels(16))
        made, _ = through(Codec(profile, of), of, rows)
        others = np.arange(64) != 5
        off[name] = float(np.abs(to_floats(made[1], "float32") - numbers)[:, others].mean())
    assert off["hadamard"] < off["none"] / 2


@pytest.mark.parametrize("kind", ["none", "hadamard"])
@pytest.mark.parametrize("coder", ["pack", "rans"])
def test_more_levels_lose_less_and_take_more(kind: str, coder: str) -> None:
    """But for two: both of them are as frequent, while of three the one in the middle is most."""
    of = geometry("float32", dim=64)
    rows = random_rows(of, 128)
    seen = []
    for count in (2, 3, 4, 6, 8, 12, 16, 32, 64, 128, 256):
        profile = Profile("it", kind, "uniform", Levels(count), Levels(count), coder=coder)
        made, nbytes = through(Codec(profile, of), of, rows)
        seen.append(
            (float(np.square(to_floats(made, "float32") - to_floats(rows, "float32")).mean()), nbytes)
        )
    assert [off for off, _ in seen] == sorted((off for off, _ in seen), reverse=True)
    sizes = [nbytes for _, nbytes in seen][1:]
    assert sizes == sorted(sizes)


def test_the_heads_of_all_layers_are_ranked_together() -> None:
    """Of 12 heads the lowest quarter is low; where it is, errors are larger and nowhere else."""
    of = geometry("float32", dim=32)
    ranks = np.arange(12, dtype=np.float32).reshape(4, 3)
    ranks[2, 1] = -1  # so it is this one, and the first two of layer 0
    profile = Profile("it", "none", "mixed_head", Levels(256, 2), Levels(256, 2), 0.25, "rans")
    codec, rows = Codec(profile, of, head_scores=ranks), random_rows(of, 64)
    is_low = np.zeros((4, 3), np.bool_)
    for layer in range(4):
        made, _ = through(codec, of, rows, layer)
        off = np.abs(to_floats(made, "float32") - to_floats(rows, "float32")).reshape(2, 64, 3, 32)
        is_low[layer] = off.mean(axis=(0, 1, 3)) > 0.1
    assert is_low.tolist() == [[True, True, False], [False] * 3, [False, True, False], [False] * 3]


def test_the_last_layers_are_low() -> None:
    of = geometry("float32", dim=32)
    profile = Profile("it", "none", "mixed_layer", Levels(200, 4), Levels(200, 4), 0.5, "pack")
    sizes = [through(Codec(profile, of), of, random_rows(of, 64), layer)[1] for layer in range(4)]
    assert sizes[0] == sizes[1] > 2 * sizes[2] and sizes[2] == sizes[3]


@pytest.mark.parametrize("number", [np.nan, np.inf, 1e30, -70000.0])
def test_kv_that_levels_cannot_hold_goes_as_it_is(number: float) -> None:
    of = geometry("float32")
    rows = random_rows(of, 4)
    rows[1].view(np.float32)[2, 3] = number
    out = np.empty(rows.nbytes + ROOM, np.uint8)
    for profile in (*profiles(), *LOSSLESS):
        nbytes = Codec(profile, of, head_scores=scores(of)).encode(0, rows[0], rows[1], out)
        assert (nbytes is None) == profile.is_lossy


@pytest.mark.parametrize("profile", profiles(), ids=lambda each: each.name)
def test_a_payload_that_does_not_fit_is_none(profile: Profile) -> None:
    of = geometry()
    rows, codec = random_rows(of, 16), Codec(profile, of, head_scores=scores(of))
    nbytes = codec.encode(0, rows[0], rows[1], np.empty(ROOM, np.uint8))
    assert nbytes is not None
    assert codec.encode(0, rows[0], rows[1], np.empty(nbytes, np.uint8)) == nbytes
    for room in {0, HEADER_NBYTES - 1, HEADER_NBYTES, nbytes // 2, nbytes - 1}:
        assert codec.encode(0, rows[0], rows[1], np.empty(room, np.uint8)) is None


@given(st.sampled_from(profiles()), st.integers(1, 20), st.integers(0, 1 << 16))
@settings(max_examples=40)
def test_what_comes_of_equal_rows_is_equal_and_settles(profile: Profile, tokens: int, seed: int) -> None:
    """Rows that lie among others are as good as rows alone."""
    of = geometry()
    rows, codec = random_rows(of, tokens, seed), Codec(profile, of, head_scores=scores(of))
    around = np.zeros((2, tokens, rows.shape[2] + 32), np.uint8)
    around[:, :, 16:-16] = rows
    among = around[:, :, 16:-16]
    one, other = np.empty((2, rows.nbytes + ROOM), np.uint8)
    nbytes = codec.encode(1, rows[0], rows[1], one)
    assert codec.encode(1, among[0], among[1], other) == nbytes
    assert nbytes is not None and (one[:nbytes] == other[:nbytes]).all()
    made = np.zeros_like(rows)
    decode(one[:nbytes], 1, of, made[0], made[1])
    around[:] = 7
    decode(one, 1, of, among[0], among[1])
    assert (among == made).all() and (around[:, :, :16] == 7).all() and (around[:, :, -16:] == 7).all()
