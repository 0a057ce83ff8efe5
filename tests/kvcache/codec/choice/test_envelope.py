"""The table of what is best at which rate is the least of all that was measured, "none" among it."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from microserve.kvcache.codec.choice.controller import Controller, Tuning
from microserve.kvcache.codec.choice.decision import Context, Reason
from microserve.kvcache.codec.choice.envelope import Envelope, Stages
from microserve.kvcache.codec.library import RAW, Library
from tests.support.kvcache.codec_libraries import CODECS, at_random, lossy, seconds

QUIET = Tuning(explore=0.0, wander=0.0)


@pytest.mark.slow
@pytest.mark.parametrize("is_overlapped", [False, True])
def test_the_table_is_the_brute_force_minimum(is_overlapped: bool) -> None:
    """Ten thousand rates from 10 kB/s to 1 TB/s with any volume, one after the other and overlapped."""
    source = random.Random(17)
    for library in (at_random(seed) for seed in range(50)):
        controller = Controller(library, tuning=QUIET)
        for _ in range(100):
            rate, nbytes = 10 ** source.uniform(4, 12), int(10 ** source.uniform(3, 10))
            num_payloads, floor = source.choice((1, 4, 30)), source.choice((0.0, 0.95))
            decision = controller.select(
                Context(
                    nbytes,
                    num_payloads,
                    rate,
                    quality_floor=floor,
                    may_lose=True,
                    codecs=CODECS,
                    is_overlapped=is_overlapped,
                )
            )
            may = [RAW, *(each for each in library.entries if each.quality.score >= floor)]
            took = {
                each.profile.name: seconds(each, nbytes, num_payloads, rate, is_overlapped=is_overlapped)
                for each in may
            }
            least = min(took.values())
            assert took[decision.profile.name] == pytest.approx(least, rel=1e-9)
            assert decision.predicted_s == pytest.approx(least, rel=1e-9)


@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("seed", range(5))
def test_each_interval_has_its_best_and_borders_ascend(seed: int, overlap: float) -> None:
    source = random.Random(seed)
    stages = [Stages(0.0, 0.0, 1.0)]
    stages += [Stages(source.random() * 1e-8, source.random() * 1e-8, source.random()) for _ in range(12)]
    envelope = Envelope(stages, overlap)
    assert all(low < high for low, high in pairwise(envelope.borders))
    assert all(one != other for one, other in pairwise(envelope.best))
    assert envelope.best[0] == 0  # a link without end: nothing is faster than nothing
    edges = [0.0, *envelope.borders, envelope.borders[-1] * 4]
    for interval, (low, high) in enumerate(pairwise(edges)):
        x = (low + high) / 2
        assert envelope.interval(x) == interval
        values = [each.at(x, overlap) for each in stages]
        assert values[envelope.best[interval]] == min(values)
        near = envelope.near(interval)
        assert near[0] == envelope.best[interval] and len(near) == len(set(near)) <= 3


def test_equals_are_the_first_ones() -> None:
    twins = Envelope([Stages(0.0, 0.0, 1.0), Stages(1e-9, 0.0, 0.5), Stages(0.0, 1e-9, 0.5)], 0.0)
    assert twins.best == [0, 1]
    assert Envelope([Stages(0.0, 0.0, 1.0), Stages(0.0, 0.0, 1.0)], 0.0).best == [0]


def test_break_even_does_not_depend_on_the_volume_and_counts_both_stages_in_full() -> None:
    """B* = (1 - 1/ratio) / (1/s_enc + 1/s_dec), without the factor of 2 of KVServe's repository."""
    stages = Stages(encode_s=1 / 40e9, decode_s=1 / 60e9, wire_share=1 / 8)
    expected = (1 - 1 / 8) / (1 / 40e9 + 1 / 60e9)
    assert stages.break_even(0.0) == pytest.approx(expected)
    library = Library(entries=[lossy("a", 8.0, 40e9, 60e9)])
    controller = Controller(library, tuning=QUIET)
    for nbytes in (1 << 10, 1 << 20, 1 << 33):
        for factor, name in ((0.99, "a"), (1.01, "none")):
            context = Context(nbytes, 1, expected * factor, may_lose=True, codecs=CODECS)
            assert controller.select(context).profile.name == name


@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.9])
def test_raw_is_as_fast_at_break_even_with_overlap_too(overlap: float) -> None:
    stages = Stages(3e-9, 1e-9, 0.25)
    x = 1.0 / stages.break_even(overlap)
    assert stages.at(x, overlap) == pytest.approx(x)
    assert stages.at(x * 1.01, overlap) < x * 1.01 and stages.at(x * 0.99, overlap) > x * 0.99
    assert Stages(1e-9, 0.0, 1.1).break_even(overlap) == 0.0  # it grows: never


def test_above_every_break_even_nothing_is_encoded_not_even_to_explore() -> None:
    """Bypass: what a transfer takes there is what raw takes."""
    controller = Controller(at_random(3), tuning=Tuning(explore=0.5, wander=0.5))
    for _ in range(200):
        decision = controller.select(Context(1 << 24, 8, 1e12, may_lose=True, codecs=CODECS))
        assert (decision.profile.name, decision.reason) == ("none", Reason.MODEL)
        assert decision.predicted_s == pytest.approx((1 << 24) / 1e12)
        controller.observe(decision, decision.predicted_s)


def test_fixed_costs_make_small_payloads_go_as_they_are() -> None:
    controller = Controller(Library(entries=[lossy("a", 8.0, 1e9, 1e9, a_s=1e-3)]), tuning=QUIET)
    rate = 100e6

    def choice(nbytes: int, num_payloads: int) -> str:
        return controller.select(
            Context(nbytes, num_payloads, rate, may_lose=True, codecs=CODECS)
        ).profile.name

    assert choice(64 << 20, 64) == "a"
    assert choice(1 << 20, 64) == "none"  # 16 KiB each
    assert choice(1 << 20, 1) == "a"
    assert choice(1 << 10, 1) == "none"


def test_with_overlap_the_slowest_stage_counts() -> None:
    """A codec as slow as the link costs its time once more in sequence, nothing in a pipeline."""
    controller = Controller(Library(entries=[lossy("a", 2.0, 120e6, 120e6)]), tuning=QUIET)
    plain = Context(1 << 24, 32, 100e6, may_lose=True, codecs=CODECS)
    assert controller.select(plain).profile.name == "none"
    decision = controller.select(
        Context(1 << 24, 32, 100e6, may_lose=True, codecs=CODECS, is_overlapped=True)
    )
    assert decision.profile.name == "a"
    assert decision.predicted_s < (1 << 24) / 100e6
