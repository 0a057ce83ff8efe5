"""C++ gives numpy's bytes, and takes what numpy takes, to the bit."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microserve.kernels.codec import native
from microserve.kernels.codec.build import SOURCE
from microserve.kvcache.codec import codec
from microserve.kvcache.codec.frame import CodecFailed
from microserve.kvcache.codec.profile import Levels, Profile
from microserve.kvcache.codec.steps import body, transform
from microserve.kvcache.codec.steps.body import Task
from microserve.kvcache.codec.steps.native import NativeBody
from tests.kvcache.codec.conftest import VARIANTS, native_body
from tests.support.kvcache.codec import geometry, profiles, random_rows, to_rows

DTYPES = ("float32", "bfloat16", "float16")


@pytest.fixture(scope="module", params=VARIANTS)
def by_cpp(request: pytest.FixtureRequest) -> NativeBody:
    return native_body(request.param)


def mask_of(profile: Profile) -> np.ndarray:
    return np.array([True, not profile.is_mixed, True])


def put_both(
    by_cpp: NativeBody, task: Task, is_high: np.ndarray, rows: np.ndarray, room: int | None = None
) -> bytes | None:
    room = rows.nbytes * 2 + 8192 if room is None else room
    ours, theirs = np.zeros(room, np.uint8), np.ones(room, np.uint8)
    told = body.put(task, is_high, tuple(rows), ours)
    assert by_cpp.put(task, is_high, tuple(rows), theirs) == told
    if told is None:
        return None
    assert ours[:told].tobytes() == theirs[:told].tobytes()
    return ours[:told].tobytes()


def take_both(by_cpp: NativeBody, task: Task, content: np.ndarray, like: np.ndarray) -> None:
    """What comes out is equal, or neither takes it."""
    results = []
    ways: tuple[codec._Way, ...] = (body, by_cpp)
    for way in ways:
        rows = np.zeros_like(like)
        try:
            way.take(task, content, tuple(rows))
        except CodecFailed:
            results.append(b"")
        else:
            results.append(rows.tobytes())
    assert results[0] == results[1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("profile", profiles(), ids=lambda each: each.name)
def test_every_profile_has_one_form(by_cpp: NativeBody, profile: Profile, dtype: str) -> None:
    for tokens, heads, dim in ((1, 1, 1), (3, 2, 7), (16, 2, 64), (33, 2, 80)):
        task = Task(profile, dtype, heads, dim, 3, transform.SEED)
        rows = random_rows(geometry(dtype, heads, dim), tokens, seed=tokens)
        for mask in itertools.product((True, False), repeat=heads if profile.is_mixed else 0):
            is_high = np.array(mask or [True] * heads)
            content = put_both(by_cpp, task, is_high, rows)
            assert content is not None
            take_both(by_cpp, task, np.frombuffer(content, np.uint8), rows)


@given(
    dtype=st.sampled_from(DTYPES),
    name=st.sampled_from(("none", "hadamard")),
    coder=st.sampled_from(("none", "pack", "zstd", "rans")),
    counts=st.lists(st.integers(2, 256), min_size=4, max_size=4),
    tokens=st.integers(1, 50),
    heads=st.integers(1, 4),
    dim=st.integers(1, 40),
    scale=st.sampled_from((0.0, 1e-9, 1e-4, 1.0, 1e4, 3e4)),
    seed=st.integers(0, 1 << 16),
)
@settings(max_examples=60)
def test_any_levels_and_numbers_have_one_form(
    by_cpp: NativeBody,
    dtype: str,
    name: str,
    coder: str,
    counts: list[int],
    tokens: int,
    heads: int,
    dim: int,
    scale: float,
    seed: int,
) -> None:
    """Numbers of all sizes that there are, beyond what levels hold, and the two zeros."""
    random = np.random.default_rng(seed)
    profile = Profile(
        "it", name, "mixed_head", Levels(counts[0], counts[1]), Levels(counts[2], counts[3]), 0.5, coder
    )
    numbers = random.standard_normal((2, tokens, heads * dim)) * scale
    numbers *= 10.0 ** random.integers(-6, 1, numbers.shape) if seed % 2 else 1.0
    numbers[random.random(numbers.shape) < 0.1] *= 0.0
    rows = np.stack([to_rows(half.astype(np.float32), dtype) for half in numbers])
    task = Task(profile, dtype, heads, dim, seed % 90, seed)
    content = put_both(by_cpp, task, random.random(heads) < 0.5, rows)
    if content is not None:
        take_both(by_cpp, task, np.frombuffer(content, np.uint8), rows)


@given(
    dtype=st.sampled_from(DTYPES),
    coder=st.sampled_from(("zstd", "rans")),
    tokens=st.integers(1, 40),
    width=st.integers(1, 60),
    kinds=st.integers(1, 256),
    seed=st.integers(0, 1 << 16),
)
def test_any_bits_have_one_exact_form(
    by_cpp: NativeBody, dtype: str, coder: str, tokens: int, width: int, kinds: int, seed: int
) -> None:
    item = 4 if dtype == "float32" else 2
    rows = np.random.default_rng(seed).integers(0, kinds, (2, tokens, width * item), np.uint8)
    task = Task(Profile("it", coder=coder), dtype, 1, 1, 0, 0)
    content = put_both(by_cpp, task, np.ones(1, np.bool_), rows)
    assert content is not None
    made = np.zeros_like(rows)
    by_cpp.take(task, np.frombuffer(content, np.uint8), tuple(made))
    assert (made == rows).all()


@pytest.mark.parametrize("profile", profiles(), ids=lambda each: each.name)
def test_both_find_the_same_room_too_small(by_cpp: NativeBody, profile: Profile) -> None:
    task = Task(profile, "bfloat16", 3, 8, 3, transform.SEED)
    rows, is_high = random_rows(geometry(), 20), mask_of(profile)
    content = put_both(by_cpp, task, is_high, rows)
    assert content is not None
    for room in {*range(0, len(content), 97), *range(len(content) - 4, len(content) + 40, 3)}:
        if room >= 0:
            assert (put_both(by_cpp, task, is_high, rows, room) is None) == (room < len(content))


@given(data=st.data(), profile=st.sampled_from(profiles()))
@settings(max_examples=120)
def test_both_take_the_same_of_what_was_changed(
    by_cpp: NativeBody, profile: Profile, data: st.DataObject
) -> None:
    task = Task(profile, "bfloat16", 3, 8, 1, transform.SEED)
    rows = random_rows(geometry(), 20)
    content = put_both(by_cpp, task, mask_of(profile), rows)
    assert content is not None
    made = np.frombuffer(content, np.uint8).copy()
    for _ in range(data.draw(st.integers(1, 4))):
        made[data.draw(st.integers(0, made.size - 1))] = data.draw(st.integers(0, 255))
    change = data.draw(st.integers(-30, 30))
    made = made[:change] if change < 0 else np.concatenate((made, np.zeros(change, np.uint8)))
    take_both(by_cpp, task, made, rows)


def test_rows_that_lie_scattered_are_taken_as_they_lie(by_cpp: NativeBody) -> None:
    for profile in profiles():
        task = Task(profile, "bfloat16", 3, 8, 1, transform.SEED)
        wide = np.random.default_rng(1).integers(0, 60, (2, 20, 96), np.uint8)
        for rows in (wide[:, ::2, 16:64], wide[:, :, ::2]):
            content = put_both(by_cpp, task, mask_of(profile), rows)
            assert content is not None
            made = np.zeros_like(wide)
            into = made[:, ::2, 16:64] if rows.shape[1] == 10 else made[:, :, ::2]
            by_cpp.take(task, np.frombuffer(content, np.uint8), tuple(into))
            like = np.zeros_like(np.ascontiguousarray(rows))
            body.take(task, np.frombuffer(content, np.uint8), tuple(like))
            assert (into == like).all()


def test_without_a_compiler_it_is_numpy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "/nowhere/c++")
    monkeypatch.setenv("MICROSERVE_KERNEL_CACHE", str(tmp_path))
    native.native_codec.cache_clear()
    codec._way.cache_clear()
    try:
        assert native.native_codec() is None or SOURCE.prebuilt.is_dir()
        assert codec._way() is body or SOURCE.prebuilt.is_dir()
    finally:
        native.native_codec.cache_clear()
        codec._way.cache_clear()
