"""Numbers of a request: defaults, the model's limits, and the name of whatever is wrong."""

from __future__ import annotations

import json
from typing import Any

import pytest

from microserve.gateway.api.parse import parse
from microserve.gateway.openai.chat import chat_request
from microserve.gateway.openai.completions import DEFAULT_MAX_TOKENS, completion_request
from microserve.gateway.openai.schema import ChatRequest, CompletionRequest
from microserve.gateway.request.request import GenerateRequest
from microserve.gateway.request.sampling import check_choices, sampling_of, seed_of
from microserve.gateway.routers.link import ModelLimits
from microserve.protocol.errors import InvalidRequest, PromptTooLong
from microserve.protocol.messages.request.sampling import SamplingParams

LIMITS = ModelLimits(max_model_len=100, vocab_size=50)


def chat(**fields: Any) -> GenerateRequest:
    body = {"model": "m", "messages": [{"role": "user", "content": ""}], **fields}
    return chat_request(parse(json.dumps(body).encode(), ChatRequest))


def completion(**fields: Any) -> GenerateRequest:
    body = {"model": "m", "prompt": "", **fields}
    return completion_request(parse(json.dumps(body).encode(), CompletionRequest))


def sampling(request: GenerateRequest, prompt: int = 10) -> SamplingParams:
    return sampling_of(request, LIMITS, prompt)


def test_default_length() -> None:
    assert sampling(chat()).max_tokens == 90
    assert sampling(completion()).max_tokens == DEFAULT_MAX_TOKENS
    assert sampling(completion(), prompt=95).max_tokens == 5


def test_the_newer_name_of_max_tokens_wins() -> None:
    assert sampling(chat(max_tokens=3, max_completion_tokens=4)).max_tokens == 4
    assert sampling(chat(max_tokens=3)).max_tokens == 3


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
@pytest.mark.parametrize("value", [0, -1, 91])
def test_a_length_that_does_not_fit_is_named_as_it_was_sent(name: str, value: int) -> None:
    with pytest.raises(PromptTooLong if value > 0 else InvalidRequest) as caught:
        sampling(chat(**{name: value}))
    assert caught.value.field == name
    assert value <= 0 or "maximum context length is 100 tokens" in caught.value.detail


def test_a_prompt_needs_room_for_one_token() -> None:
    assert sampling(chat(), prompt=99).max_tokens == 1
    for prompt in (100, 101):
        for request, field in ((chat(), "messages"), (completion(), "prompt")):
            with pytest.raises(PromptTooLong, match="maximum context length is 100 tokens") as caught:
                sampling(request, prompt=prompt)
            assert caught.value.field == field


def test_every_number_arrives() -> None:
    request = chat(
        max_tokens=20,
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        min_p=0.1,
        min_tokens=2,
        seed=5,
        presence_penalty=1.0,
        frequency_penalty=-1.0,
        repetition_penalty=1.2,
        logit_bias={"3": 2.0},
        stop_token_ids=[4, 5],
        ignore_eos=True,
        logprobs=True,
        top_logprobs=3,
    )
    assert sampling(request) == SamplingParams(
        max_tokens=20,
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        min_p=0.1,
        min_tokens=2,
        seed=5,
        presence_penalty=1.0,
        frequency_penalty=-1.0,
        repetition_penalty=1.2,
        logit_bias={3: 2.0},
        stop_token_ids=(4, 5),
        ignore_eos=True,
        logprobs=3,
    )


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_tokens": 99}, "min_tokens"),
        ({"presence_penalty": 3.0}, "presence_penalty"),
        ({"logit_bias": {"50": 1.0}}, "logit_bias"),
        ({"stop_token_ids": [50]}, "stop_token_ids"),
        ({"seed": 2**63}, "seed"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ],
)
def test_numbers_out_of_bounds_are_named(fields: dict[str, Any], where: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        sampling(chat(**fields))
    assert caught.value.field == where


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"n": 0}, "n"),
        ({"n": 5}, "n"),
        ({"stop": [""]}, "stop[0]"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": "x" * 1025}, "stop"),
        ({"cache_salt": "x" * 257}, "cache_salt"),
    ],
)
def test_options_out_of_bounds_are_named(fields: dict[str, Any], where: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_choices(chat(**fields), max_n=4)
    assert caught.value.field == where


def test_off_switches() -> None:
    assert sampling(chat(top_k=-1)).top_k == 0
    assert sampling(chat(logprobs=False)).logprobs is None
    assert sampling(chat(logprobs=True)).logprobs == 0
    assert sampling(completion(logprobs=0)).logprobs == 0


def test_seeds_differ_by_choice_and_stay_in_bounds() -> None:
    assert [seed_of(7, index) for index in range(3)] == [7, 8, 9]
    assert seed_of(2**63 - 1, 1) == 0
    assert sampling(chat(seed=-1)).seed == 2**63 - 1
    assert sampling(chat()).seed != sampling(chat()).seed
