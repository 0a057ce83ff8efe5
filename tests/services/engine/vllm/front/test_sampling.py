"""Sampling parameters in vLLM's words."""

from __future__ import annotations

import pytest

from microserve.protocol.errors import InvalidRequest
from microserve.protocol.messages.request.sampling import Grammar, SamplingParams
from microserve.services.engine.vllm.front.sampling import STRUCTURED, first_of, sampling_of

pytestmark = pytest.mark.slow

ENDS = frozenset({2, 7})

VLLM_FIELDS = {
    *("max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
    *("presence_penalty", "frequency_penalty", "seed", "logprobs", "prompt_logprobs", "logit_bias"),
    *("stop_token_ids", "ignore_eos", "detokenize", STRUCTURED),
}
"""Fields of the ``SamplingParams`` of vLLM 0.32 that are used; tests with vLLM hold them against it."""


def test_every_parameter_has_its_name_at_vllm() -> None:
    params = SamplingParams(
        max_tokens=9,
        min_tokens=3,
        temperature=0.5,
        top_p=0.9,
        top_k=5,
        min_p=0.1,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=0.3,
        logit_bias={4: -1.0},
        seed=11,
        logprobs=2,
        stop_token_ids=(5,),
        prompt_logprobs=1,
    )
    said = sampling_of(params, ENDS)
    assert said.keys() <= VLLM_FIELDS
    assert said["seed"] == 11 and said["top_k"] == 5 and said["logit_bias"] == {4: -1.0}
    assert said["stop_token_ids"] == [2, 5, 7], "which tokens end a sequence is said, and not left to vLLM"
    assert said["prompt_logprobs"] == 1 and said["logprobs"] == 2 and said["detokenize"] is False


def test_a_greedy_row_has_no_generator_of_its_own() -> None:
    assert sampling_of(SamplingParams(temperature=0.0, seed=5), ENDS)["seed"] is None


def test_ends_are_ignored_when_asked() -> None:
    assert sampling_of(SamplingParams(ignore_eos=True, stop_token_ids=(5,)), ENDS)["stop_token_ids"] == [5]


@pytest.mark.parametrize(("num_output", "max_tokens", "min_tokens"), [(0, 10, 4), (3, 7, 1), (9, 1, 0)])
def test_a_continued_stream_has_less_to_go(num_output: int, max_tokens: int, min_tokens: int) -> None:
    params = SamplingParams(max_tokens=10, min_tokens=4, prompt_logprobs=1)
    said = sampling_of(params, ENDS, num_output_tokens=num_output)
    assert (said["max_tokens"], said["min_tokens"]) == (max_tokens, min_tokens)
    assert ("prompt_logprobs" in said) == (num_output == 0)


def test_the_first_token_alone() -> None:
    said = first_of(SamplingParams(max_tokens=10, min_tokens=4, prompt_logprobs=1), ENDS, num_output_tokens=0)
    assert (said["max_tokens"], said["min_tokens"]) == (1, 1) and "prompt_logprobs" not in said


@pytest.mark.parametrize(
    ("grammar", "said"),
    [
        (Grammar(kind="json_schema", text="{}"), {"json": "{}"}),
        (Grammar(kind="json_object"), {"json_object": True}),
        (Grammar(kind="regex", text="a+"), {"regex": "a+"}),
        (Grammar(kind="choice", text='["a", "b"]'), {"choice": ["a", "b"]}),
        (Grammar(kind="lark", text="start: /a/"), {"grammar": "start: /a/"}),
    ],
)
def test_grammars_are_structured_outputs(grammar: Grammar, said: dict[str, object]) -> None:
    sampling = sampling_of(SamplingParams(grammar=grammar), ENDS)
    assert sampling[STRUCTURED] == said
    assert not sampling["ignore_eos"], "a grammar ends by the tokenizer's own end"


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar(kind="regex", text="a+", after_token_ids=(3,)),
        Grammar(kind="choice", text="a"),
    ],
)
def test_what_vllm_cannot_be_told_names_the_field(grammar: Grammar) -> None:
    with pytest.raises(InvalidRequest) as caught:
        sampling_of(SamplingParams(grammar=grammar), ENDS)
    assert caught.value.field == "grammar"
