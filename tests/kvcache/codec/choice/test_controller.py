"""Who may be chosen, what keeps the time allowed, and what is done where nothing does."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from microserve.kvcache.codec.choice.controller import Controller, Tuning
from microserve.kvcache.codec.choice.decision import Context, Reason
from microserve.kvcache.codec.library import BUILT_IN, Library
from microserve.protocol.errors import InvalidRequest
from tests.support.kvcache.codec_libraries import CODECS, at_random, lossless, lossy

MB = 1_000_000
FAST = lossy("fast", 8.0, 500 * MB, 500 * MB, score=0.97)
SLOW = lossy("slow", 4.0, 300 * MB, 300 * MB, score=0.99)
EXACT = lossless("exact", 1.4, 500 * MB)
LIBRARY = Library(entries=[FAST, SLOW, EXACT])
QUIET = Tuning(explore=0.0, wander=0.0)
CONTEXT = Context(10 * MB, 1, 10.0 * MB, may_lose=True, codecs=CODECS)
"""A second as it is."""

pytestmark = pytest.mark.quick


def chosen(context: Context) -> str:
    return Controller(LIBRARY, tuning=QUIET).select(context).profile.name


def test_who_may_be_chosen() -> None:
    assert chosen(CONTEXT) == "fast"
    assert chosen(replace(CONTEXT, quality_floor=0.98)) == "slow"
    assert chosen(replace(CONTEXT, quality_floor=0.995)) == "exact"
    assert chosen(replace(CONTEXT, may_lose=False)) == "exact"
    assert chosen(replace(CONTEXT, codecs=frozenset({"kv1:zstd"}))) == "exact"
    assert chosen(replace(CONTEXT, codecs=frozenset())) == "none"


def test_a_link_that_nobody_measured_is_measured_raw() -> None:
    decision = Controller(LIBRARY).select(replace(CONTEXT, link_bytes_per_s=0.0))
    assert (decision.profile.name, decision.reason) == ("none", Reason.UNKNOWN_LINK)


def test_nothing_to_send_is_sent_raw() -> None:
    assert chosen(replace(CONTEXT, nbytes=0)) == "none"


def test_a_busy_decoder_makes_codecs_dearer() -> None:
    assert chosen(replace(CONTEXT, decode_queued_s=0.5)) == "fast"
    assert chosen(replace(CONTEXT, decode_queued_s=2.0)) == "none"
    assert chosen(replace(CONTEXT, decode_s_per_byte=1e-7)) == "none"


def test_by_its_name() -> None:
    controller = Controller(LIBRARY)
    decision = controller.decide("slow", CONTEXT)
    assert (decision.profile, decision.reason) == (SLOW.profile, Reason.ASKED)
    assert decision.predicted_s == pytest.approx(10 / 4 / 10 + 2 * 10 / 300)
    assert not controller.decide("", CONTEXT).is_encoded
    with pytest.raises(
        InvalidRequest, match="'fats' is not in the engine's library: none, fast, slow"
    ) as caught:
        controller.decide("fats", CONTEXT)
    assert caught.value.field == "codec"


@pytest.mark.parametrize(
    ("context", "why_not"),
    [
        (replace(CONTEXT, may_lose=False), "exact"),
        (replace(CONTEXT, codecs=frozenset({"kv1:zstd"})), "the receiver does not decode kv1:rans"),
    ],
)
def test_one_that_may_not_be_used_is_refused_and_kv_goes_as_it_is(context: Context, why_not: str) -> None:
    decision = Controller(LIBRARY).decide("fast", context)
    assert (decision.profile.name, decision.reason) == ("none", Reason.REFUSED)
    assert why_not in decision.detail and decision.predicted_s == pytest.approx(1.0)


def test_who_misses_the_time_allowed_rests_and_comes_back() -> None:
    controller = Controller(LIBRARY, tuning=Tuning(explore=0.0, wander=0.0, weight=0.0, max_misses=2, rest=5))
    context = replace(CONTEXT, slo_s=0.3)
    for _ in range(3):
        decision = controller.select(context)
        assert decision.profile.name == "fast"
        controller.observe(decision, 0.4)
        controller.check_integrity()
    # Nobody else is in time: raw, until it has rested.
    assert [controller.select(context).profile.name for _ in range(6)] == ["none"] * 4 + ["fast"] * 2
    decision = controller.select(context)
    controller.observe(decision, 0.4)
    assert controller.select(context).profile.name == "fast"  # its record is clean again


def test_misses_of_long_ago_do_not_count() -> None:
    controller = Controller(
        LIBRARY, tuning=Tuning(explore=0.0, wander=0.0, weight=0.0, window=4, max_misses=1, rest=5)
    )
    context = replace(CONTEXT, slo_s=0.3)
    for number in range(40):
        decision = controller.select(context)
        assert decision.profile.name == "fast"
        controller.observe(decision, 0.4 if number % 5 == 0 else 0.2)


def test_where_nothing_is_in_time_kv_goes_as_it_is() -> None:
    decision = Controller(LIBRARY).select(replace(CONTEXT, slo_s=0.01))
    assert (decision.profile.name, decision.reason) == ("none", Reason.NONE_FEASIBLE)
    assert decision.predicted_s == pytest.approx(1.0)


def test_one_that_seems_too_slow_is_tried_all_the_same() -> None:
    """It is passed over for what was seen, which only another look can change."""
    controller = Controller(LIBRARY, tuning=Tuning(explore=0.2), seed=2)
    context = replace(CONTEXT, slo_s=0.35)
    for _ in range(3):
        controller.observe(controller.select(context), 5.0)
    reasons = set()
    for _ in range(60):
        decision = controller.select(context)
        reasons.add((decision.profile.name, decision.reason))
    assert ("fast", Reason.EXPLORED) in reasons


def test_without_a_library_what_loses_nothing_is_known() -> None:
    controller = Controller(BUILT_IN, tuning=QUIET)
    slow_link = Context(100 * MB, 100, 1.0 * MB, may_lose=True, codecs=CODECS, is_overlapped=True)
    assert controller.select(slow_link).is_encoded
    assert not controller.select(replace(slow_link, link_bytes_per_s=5000.0 * MB)).is_encoded


def test_whatever_is_asked_and_seen_it_stays_sound() -> None:
    source = random.Random(9)
    controller = Controller(at_random(9), tuning=Tuning(explore=0.3, wander=0.3, rest=4), seed=9)
    for _ in range(300):
        context = Context(
            source.choice((0, 1, 1000, 10 * MB)),
            source.choice((0, 1, 60)),
            source.choice((0.0, 1.0, 1e6, 1e12)),
            slo_s=source.choice((0.0, 0.1, 10.0, math.inf)),
            quality_floor=source.choice((0.0, 0.97, 2.0)),
            may_lose=source.random() < 0.7,
            codecs=source.choice((CODECS, frozenset())),
            decode_queued_s=source.choice((0.0, 1.0)),
            is_overlapped=source.random() < 0.5,
        )
        decision = controller.select(context)
        assert not (decision.profile.is_lossy and not context.may_lose)
        assert not (decision.is_encoded and not context.codecs)
        controller.observe(decision, source.choice((0.0, -1.0, math.inf, math.nan, 1e-9, 0.5, 1e9)))
        controller.check_integrity()
