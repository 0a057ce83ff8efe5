"""A model that goes on from KV, beside the same model that computes all at once; and what is lost by less."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from microserve.kvcache.codec.profile import Levels, Profile
from microserve.protocol.errors import ConfigError
from microserve.protocol.messages.kv.geometry import Geometry
from microserve.services.command.profile.measure.quality import Judge
from microserve.services.command.profile.measure.replay import SINK_TOKENS, Branch, Replay
from microserve.services.command.profile.measure.trip import Payloads
from microserve.services.command.profile.workload import Prompt
from microserve.services.engine.model.model import load_model
from tests.support.engine.model.tiny_model import make_tiny_model

BLOCK = 8


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def replay(directory: Path) -> Replay:
    return Replay(load_model(directory, dtype="float32"), BLOCK, 256)


def prompts(count: int, length: int = 45) -> list[list[int]]:
    chance = np.random.default_rng(5)
    return [chance.integers(3, 250, length + turn % 7).tolist() for turn in range(count)]


def test_it_says_what_the_whole_model_says(directory: Path, replay: Replay) -> None:
    whole = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    every = prompts(9)  # more than the pool holds at a time
    kvs = [replay.prefill(ids) for ids in every]
    rests = [ids[kv.num_tokens :] for ids, kv in zip(every, kvs, strict=True)]
    assert all(kv.num_tokens % BLOCK == 0 and rest for kv, rest in zip(kvs, rests, strict=True))
    more = [[7, 9, 11], [13]]
    said = replay.go_on(kvs, [[Branch(rest + tail, len(tail) + 1) for tail in more] for rest in rests])
    with torch.no_grad():
        for ids, own in zip(every, said, strict=True):
            for tail, branch in zip(more, own, strict=True):
                logits = whole(torch.tensor([ids + tail])).logits[0, len(ids) - 1 :]
                torch.testing.assert_close(branch.logits, logits, atol=1e-4, rtol=1e-4)
                assert branch.attention.shape[:2] == (2, len(tail) + 1)


def test_an_answer_is_the_likeliest_tokens_one_by_one(replay: Replay) -> None:
    every = prompts(5)
    kvs = [replay.prefill(ids) for ids in every]
    rests = [ids[kv.num_tokens :] for ids, kv in zip(every, kvs, strict=True)]
    answers = replay.answers(kvs, rests, 6)
    branches = [[Branch(rest + said[:-1], len(said))] for rest, said in zip(rests, answers, strict=True)]
    for said, own in zip(answers, replay.go_on(kvs, branches), strict=True):
        assert own[0].logits.argmax(-1).tolist() == said


def test_attention_that_looks_far(replay: Replay) -> None:
    ids = prompts(1)[0]
    whole = replay.far_masses(ids, 1)  # all but itself and the first few
    near = replay.far_masses(ids, 30)
    assert whole.shape == (2, 3)
    assert (near < whole).all() and (whole < 1).all() and (near > 0).all()
    short = replay.far_masses(ids[: SINK_TOKENS + 3], 30)
    assert (short == 0).all()  # nothing is far there


def judged(replay: Replay) -> tuple[Judge, Payloads]:
    spec = replay.spec
    geometry = Geometry(
        dtype="float32",
        order="rows",
        block_size=BLOCK,
        num_layers=spec.num_layers,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
    )
    every = prompts(6)
    plain = Judge(replay, [Prompt(ids) for ids in every], 5)
    asked = [Prompt(ids, tuple(said[:2])) for ids, said in zip(every, plain.said, strict=True)]
    wrong = [Prompt(each.token_ids, (3, 4)) if turn == 0 else each for turn, each in enumerate(asked)]
    return Judge(replay, wrong, 5), Payloads(geometry, np.ones((2, 3), np.float32), 16)


def test_kv_as_it_is_loses_nothing_and_fewer_levels_lose_more(replay: Replay) -> None:
    judge, payloads = judged(replay)
    assert judge.num_right == (5, 6)
    same = judge.quality(judge.seen([kv.rows for kv in judge.kvs]))
    assert (same.score, same.logit_kl, same.attention_error, same.greedy_agreement) == (1.0, 0.0, 0.0, 1.0)
    assert same.score_low < 1.0
    divergences, errors = [], []
    for levels in (4, 16, 64, 256):
        profile = Profile("u", quantiser="uniform", keys=Levels(levels), values=Levels(levels))
        quality = judge.quality(
            judge.seen([payloads.there_and_back(profile, kv.rows)[0] for kv in judge.kvs])
        )
        divergences.append(quality.logit_kl)
        errors.append(quality.attention_error)
        assert quality.score_low <= quality.score <= quality.score_high
    assert divergences == sorted(divergences, reverse=True) and divergences[-1] < divergences[0] / 10
    assert errors == sorted(errors, reverse=True)


def test_a_task_that_the_model_cannot_do_measures_nothing(replay: Replay) -> None:
    judge = Judge(replay, [Prompt(ids, (3, 4, 5)) for ids in prompts(3)], 2)
    with pytest.raises(ConfigError, match="none of 3 answers"):
        judge.quality(judge.seen([kv.rows for kv in judge.kvs]))
