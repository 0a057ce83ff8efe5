"""A row's token and log-probabilities have the same bits in any batch: logits that are equal end equal."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.services.engine.core.batch import Sampled, SampleSpec
from microserve.services.engine.model.device.device_sampler import sample_there
from microserve.services.engine.model.sampler import sample

Draw = Callable[[torch.Tensor, Sequence[SampleSpec]], list[Sampled]]
VOCABS = (320, 1003, 49_152)
PARAMS = (
    SamplingParams(temperature=0.0, logprobs=5),
    SamplingParams(temperature=0.8, seed=9, logprobs=1),
    SamplingParams(temperature=1.0, top_p=0.9, seed=8, logprobs=3),
    SamplingParams(temperature=0.5, top_k=50, min_p=0.01, seed=7, logprobs=20),
    SamplingParams(temperature=1.3, repetition_penalty=1.2, frequency_penalty=0.3, seed=6, logprobs=0),
    SamplingParams(temperature=0.0),
)


def bits(sampled: Sampled) -> tuple[int, bytes | None, list[tuple[int, bytes]]]:
    assert sampled.error is None
    pack = struct.Struct("<d").pack
    logprob = None if sampled.logprob is None else pack(sampled.logprob)
    return sampled.token_id, logprob, [(token, pack(value)) for token, value in sampled.top]


@pytest.mark.parametrize(
    ("vocab", "draw"),
    [*((vocab, sample) for vocab in VOCABS), *((vocab, sample_there) for vocab in VOCABS[:2])],
)
@settings(deadline=None, max_examples=8)
@given(seed=st.integers(0, 1 << 30), num_rows=st.integers(2, 24))
def test_company_order_and_place_in_memory_change_no_bit(
    vocab: int, draw: Draw, seed: int, num_rows: int
) -> None:
    rng = random.Random(seed)
    wide = vocab + rng.randrange(40)  # as the native step's logits: rows of a wider table
    table = torch.from_numpy(np.random.default_rng(seed).standard_normal((num_rows, wide), np.float32) * 4)
    specs = [
        SampleSpec(rng.choice(PARAMS), [rng.randrange(vocab) for _ in range(9)], [1, 2, 2], frozenset({3}))
        for _ in range(num_rows)
    ]
    alone = [
        bits(draw(row[:vocab].clone().unsqueeze(0), [spec])[0])
        for row, spec in zip(table, specs, strict=True)
    ]

    assert [bits(each) for each in draw(table[:, :vocab], specs)] == alone

    order = rng.sample(range(num_rows), rng.randrange(1, num_rows + 1))
    got = draw(table[order][:, :vocab], [specs[row] for row in order])
    assert [bits(each) for each in got] == [alone[row] for row in order]

    moved = torch.empty(num_rows * vocab + 7)[rng.randrange(1, 8) :][: num_rows * vocab].view(num_rows, vocab)
    moved[:] = table[:, :vocab]
    assert [bits(each) for each in draw(moved, specs)] == alone
