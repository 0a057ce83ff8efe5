"""Over links of any rate the choice is as good as the best codec would have been there, in hindsight."""

from __future__ import annotations

import math
import random

import pytest

from microserve.kvcache.codec.choice.controller import Controller
from microserve.kvcache.codec.choice.decision import Context
from microserve.kvcache.codec.choice.links import LinkMonitor
from microserve.kvcache.codec.library import RAW, Library
from tests.support.kvcache.codec_libraries import CODECS, lossless, lossy, seconds

MB = 1_000_000
LIBRARY = Library(
    entries=[
        lossy("small", 8.5, 60 * MB, 90 * MB, a_s=2e-4),
        lossy("middle", 5.0, 150 * MB, 300 * MB, a_s=1e-4),
        lossy("quick", 2.0, 900 * MB, 1200 * MB, a_s=5e-5),
        lossless("lossless", 1.3, 300 * MB, a_s=5e-5),
    ]
)
NUM_TRANSFERS = 1000
NUM_PAYLOADS = 60


def _transfers(seed: int) -> list[tuple[int, float, float]]:
    """(bytes, noise of its time, noise of what is measured of the link)."""
    source = random.Random(seed)
    return [
        (int(10 ** source.uniform(6, 7.7)), math.exp(source.gauss(0, 0.05)), math.exp(source.gauss(0, 0.05)))
        for _ in range(NUM_TRANSFERS)
    ]


@pytest.mark.parametrize("is_overlapped", [False, True])
@pytest.mark.parametrize("mbit_per_s", [10, 50, 200, 1000, 10_000])
def test_it_costs_at_most_two_percent_more_than_the_best_codec_of_all(
    mbit_per_s: int, is_overlapped: bool
) -> None:
    """With all that it costs to learn: the first transfer goes raw, for nobody knows the link."""
    rate = mbit_per_s * MB / 8
    names = {each.profile.name: each for each in (RAW, *LIBRARY.entries)}
    controller, links = Controller(LIBRARY, seed=mbit_per_s), LinkMonitor()
    static = dict.fromkeys(names, 0.0)
    chosen = 0.0
    for nbytes, noise, link_noise in _transfers(mbit_per_s):
        took = {
            name: noise * seconds(each, nbytes, NUM_PAYLOADS, rate, is_overlapped=is_overlapped)
            for name, each in names.items()
        }
        for name, each_s in took.items():
            static[name] += each_s
        decision = controller.select(
            Context(
                *(nbytes, NUM_PAYLOADS, links.goodput("b")),
                may_lose=True,
                codecs=CODECS,
                is_overlapped=is_overlapped,
            )
        )
        name = decision.profile.name
        chosen += took[name]
        controller.observe(decision, took[name])
        wire_nbytes = int(nbytes / names[name].ratio)
        links.sent("b", wire_nbytes, wire_nbytes / rate / link_noise)
    assert chosen <= 1.02 * min(static.values()), static
    if mbit_per_s == 10:
        assert static["none"] >= 2.0 * chosen
