"""The Triton generator, interpreted, against numpy's: equal to the bit."""

# mypy: disable-error-code="import-untyped, import-not-found"

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from microserve.kernels.philox import uniforms
from microserve.kernels.triton_philox import TILE, launch

SEEDS = st.sampled_from([0, 1, 2**63 - 1, 1 << 32, (1 << 32) - 1]) | st.integers(0, 2**63 - 1)
POSITIONS = st.integers(0, 200_000) | st.just((1 << 63) - 1)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.lists(st.tuples(SEEDS, POSITIONS), min_size=1, max_size=3),
    count=st.integers(1, 9) | st.sampled_from([4 * TILE - 1, 4 * TILE, 4 * TILE + 1, 5000]),
)
def test_it_is_numpy_s_generator(rows: list[tuple[int, int]], count: int) -> None:
    seeds, positions = torch.tensor(rows).unbind(1)
    out = torch.full((len(rows) + 1, count), -1.0, dtype=torch.float64)

    launch(seeds.contiguous(), positions.contiguous(), out[: len(rows)])

    for found, (seed, position) in zip(out.numpy(), rows, strict=False):
        np.testing.assert_array_equal(found, uniforms(seed, position, count))
    assert (out[-1] == -1.0).all()
