"""Many copies in one native call: the bytes that slices would copy, and nothing beside them."""

from __future__ import annotations

import subprocess
import sys
from array import array
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from microserve.kernels.scatter.host_copy import SpanCopier, span_copier

REGION = 1 << 14
# Around a line, a group of four, and what is not aligned.
SIZES = st.sampled_from([0, 1, 15, 16, 63, 64, 65, 128, 200, 512])
STARTS = st.integers(0, REGION - 512).flatmap(lambda at: st.sampled_from([at, at // 16 * 16]))


@st.composite
def span_lists(draw: st.DrawFn) -> list[tuple[int, int, int]]:
    """Runs of one size, as blocks of a pool are, with others among them."""
    spans = []
    for _ in range(draw(st.integers(0, 5))):
        nbytes = draw(SIZES)
        spans += [(draw(STARTS), draw(STARTS), nbytes) for _ in range(draw(st.integers(1, 6)))]
    return spans


@pytest.fixture(scope="module")
def copy() -> SpanCopier:
    if (found := span_copier()) is None:
        pytest.skip("no C++ compiler here")
    return found


@given(spans=span_lists(), seed=st.integers(0, 9))
def test_it_copies_what_slices_copy(copy: SpanCopier, spans: list[tuple[int, int, int]], seed: int) -> None:
    # No two write to one place: blocks of a grant do not overlap either.
    taken = np.zeros(REGION, bool)
    apart = []
    for source, target, nbytes in spans:
        if not taken[target : target + nbytes].any():
            taken[target : target + nbytes] = True
            apart.append((source, target, nbytes))
    content = np.random.default_rng(seed).integers(0, 256, REGION, np.uint8)
    mine, expected = np.full(REGION, 7, np.uint8), np.full(REGION, 7, np.uint8)
    flat = array("q", [number for span in apart for number in span])
    copy(mine.ctypes.data, content.ctypes.data, flat.buffer_info()[0], len(apart))
    for source, target, nbytes in apart:
        expected[target : target + nbytes] = content[source : source + nbytes]
    assert np.array_equal(mine, expected)


def test_without_a_compiler_there_is_none(tmp_path: Path) -> None:
    environment = {"CXX": str(tmp_path / "missing"), "MICROSERVE_KERNEL_CACHE": str(tmp_path)}
    code = "from microserve.kernels.scatter.host_copy import span_copier; assert span_copier() is None"
    subprocess.run(
        [sys.executable, "-c", code], env={**environment, "PYTHONPATH": ":".join(sys.path)}, check=True
    )
