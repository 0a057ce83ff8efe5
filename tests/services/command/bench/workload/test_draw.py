"""Lengths and times: of the mean that was asked for, and the same for the same seed."""

from __future__ import annotations

import itertools
from itertools import islice

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microserve.services.command.bench.task import Load
from microserve.services.command.bench.workload.draw import LONGEST, SHORTEST, arrivals, lengths

NUM = 4000
rates = st.floats(0.01, 1e4)


@given(rate=rates, arrival=st.sampled_from(["poisson", "constant", "bursts"]), shape=st.floats(0.05, 4.0))
@settings(max_examples=25, deadline=None)
def test_requests_come_in_order_and_a_seed_repeats_them(rate: float, arrival: str, shape: float) -> None:
    load = Load(rate=rate, arrival=arrival, burstiness=shape, seed=3)
    times = list(islice(arrivals(load), 200))
    assert times == sorted(times) and times[0] >= 0
    assert times == list(islice(arrivals(load), 200))


@pytest.mark.parametrize(("arrival", "shape"), [("poisson", 1.0), ("constant", 1.0), ("bursts", 0.25)])
def test_the_rate_and_how_they_come(arrival: str, shape: float) -> None:
    """Coefficient of variation of the gaps: 0 of a constant rate, 1 of Poisson, 1/sqrt(shape) of bursts."""
    times = list(islice(arrivals(Load(rate=20.0, arrival=arrival, burstiness=shape)), NUM))
    gaps = np.diff(times)
    assert NUM / times[-1] == pytest.approx(20.0, rel=0.15)
    variation = 0.0 if arrival == "constant" else shape**-0.5
    assert float(np.std(gaps) / np.mean(gaps)) == pytest.approx(variation, abs=0.15)


@pytest.mark.parametrize(("kind", "spread"), [("fixed", 0.0), ("uniform", 0.5), ("lognormal", 0.7)])
def test_lengths_have_their_means(kind: str, spread: float) -> None:
    load = Load(lengths=kind, spread=spread, input_len=600, output_len=90)
    prompts, outputs = zip(*islice(lengths(load), NUM), strict=True)
    assert np.mean(prompts) == pytest.approx(600, rel=0.06)
    assert np.mean(outputs) == pytest.approx(90, rel=0.06)
    if kind == "uniform":
        assert (min(prompts), max(prompts)) == (300, 900)
    assert (len(set(prompts)) == 1) == (kind == "fixed")


def test_chats_are_mostly_short_and_sometimes_long() -> None:
    prompts, outputs = zip(*islice(lengths(Load(lengths="sharegpt")), NUM), strict=True)
    for values in (prompts, outputs):
        assert min(values) >= SHORTEST and max(values) <= LONGEST
        assert 150 < np.mean(values) < 240 and np.median(values) < 0.8 * np.mean(values)


@given(
    kind=st.sampled_from(["fixed", "uniform", "lognormal", "sharegpt"]),
    mean=st.integers(1, 10**6),
    spread=st.floats(0, 1),
    seed=st.integers(),
)
@settings(deadline=None)
def test_no_length_is_less_than_one(kind: str, mean: int, spread: float, seed: int) -> None:
    load = Load(lengths=kind, input_len=mean, output_len=mean, spread=spread, seed=seed)
    drawn = list(islice(lengths(load), 20))
    assert all(number >= 1 for number in itertools.chain(*drawn))
    assert drawn == list(islice(lengths(msgspec.structs.replace(load)), 20))
