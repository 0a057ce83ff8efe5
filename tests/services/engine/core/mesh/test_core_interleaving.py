"""Random requests, splits, steps and aborts on two engine cores: every answer right, nothing leaked."""

from __future__ import annotations

import random

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.engine.core_interleaving import interleave
from tests.support.engine.core_mesh import Mesh


@given(st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_interleaving_is_exact_and_leaks_nothing(data: st.DataObject) -> None:
    """Random requests, plans and aborts on two small engines: every finished answer is right."""
    mesh = Mesh(num_blocks=data.draw(st.sampled_from([20, 40, 64])), num_slots=4)
    rng = random.Random(data.draw(st.integers(0, 1 << 30)))
    interleave(mesh, rng, data.draw(st.integers(1, 12)))
