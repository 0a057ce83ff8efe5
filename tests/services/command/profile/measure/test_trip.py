"""Payloads: all bytes counted, what comes back is what a receiver has, times as a line."""

from __future__ import annotations

import numpy as np
import pytest

from microserve.kvcache.codec.codec import Codec
from microserve.kvcache.codec.frame import HEADER_NBYTES
from microserve.kvcache.codec.profile import LOSSLESS, NONE, Levels, Profile
from microserve.protocol.messages.kv.geometry import Geometry
from microserve.services.command.profile.measure.trip import Payloads, line

GEOMETRY = Geometry(dtype="float32", order="rows", block_size=4, num_layers=2, num_kv_heads=2, head_dim=8)
UNIFORM = Profile("u", quantiser="uniform", keys=Levels(16), values=Levels(16), coder="pack")


def rows(num_tokens: int) -> np.ndarray:
    values = np.random.default_rng(1).normal(size=(2, 2, num_tokens, 16)).astype(np.float32)
    return values.view(np.uint8)


def payloads(chunk_tokens: int) -> Payloads:
    return Payloads(GEOMETRY, np.array([[0.1, 0.9], [0.8, 0.2]], np.float32), chunk_tokens)


def test_what_loses_nothing_comes_back_as_it_was() -> None:
    sent = rows(20)
    for profile in (NONE, *LOSSLESS):
        received, _ = payloads(8).there_and_back(profile, sent)
        assert np.array_equal(received, sent)


def test_every_byte_of_every_payload_counts() -> None:
    sent = rows(20)
    _, nbytes = payloads(8).there_and_back(UNIFORM, sent)
    codec, out, counted = Codec(UNIFORM, GEOMETRY), np.empty(1 << 16, np.uint8), 0
    for layer in range(2):
        for begin in (0, 8, 16):
            part = sent[layer, :, begin : begin + 8]
            counted += codec.encode(layer, part[0], part[1], out) or 0
    assert nbytes == counted > 6 * HEADER_NBYTES
    assert payloads(8).ratio(UNIFORM, [sent]) == pytest.approx(sent.nbytes / counted)


def test_what_does_not_fit_goes_as_it_is() -> None:
    sent = rows(1)  # a header and scales are more than a token's row
    received, nbytes = payloads(8).there_and_back(UNIFORM, sent)
    assert nbytes == sent.nbytes
    assert np.array_equal(received, sent)
    assert payloads(8).ratio(UNIFORM, [sent]) == 1.0


def test_mixed_heads_go_by_their_scores() -> None:
    mixed = Profile(
        "m", quantiser="mixed_head", keys=Levels(256, 4), values=Levels(256, 4), low_ratio=0.5, coder="none"
    )
    sent = rows(16)
    received, _ = payloads(16).there_and_back(mixed, sent)
    error = np.abs(received.view(np.float32) - sent.view(np.float32)).reshape(2, 2, 16, 2, 8)
    worst = error.max(axis=(1, 2, 4))
    assert worst[0, 0] > 5 * worst[0, 1] and worst[1, 1] > 5 * worst[1, 0]


def test_times_lie_on_a_line_and_the_fastest_run_counts() -> None:
    ticks = iter(range(10_000))
    slow = {2: 100.0}  # a run that something else has held up

    def clock() -> float:
        tick = next(ticks)
        return tick * 0.5 + slow.get(tick, 0.0)

    encode, decode = payloads(8).costs(UNIFORM, rows(8), (2, 4, 8), 3, clock)
    assert encode.seconds(1 << 10) == pytest.approx(0.5)
    assert decode.seconds(1 << 10) == pytest.approx(0.5)


def test_a_line_has_nothing_below_nothing() -> None:
    found = line([100.0, 200.0, 400.0], [1.1, 2.1, 4.1])
    assert (found.a_s, found.s_per_byte) == pytest.approx((0.1, 0.01))
    through = line([100.0, 200.0, 400.0], [0.8, 1.9, 4.1])
    assert through.a_s == 0.0 and through.s_per_byte == pytest.approx(0.01, rel=0.1)
    flat = line([100.0, 200.0], [2.0, 1.0])
    assert flat.s_per_byte == 0.0 and 1.0 < flat.a_s < 2.0
