"""Our sampling parameters in vLLM's words, and what cannot be said in them.

Pure: names and numbers for vLLM's ``SamplingParams``, which asyncllm.py makes of them. What vLLM itself
refuses (a temperature above 2, a schema that its matcher does not know) it says when the request is added.

A grammar goes on behind output that is part of the prompt: the connector is told so (link.py).

Differences that stay: a continued stream's earlier output counts as prompt for presence and frequency
penalties, and a seed begins its row of random numbers anew.
"""

from __future__ import annotations

from typing import Any

import msgspec

from microserve.protocol.errors import InvalidRequest
from microserve.protocol.messages.request.sampling import Grammar, SamplingParams

STRUCTURED = "structured_outputs"
"""Its value here: fields of vLLM's ``StructuredOutputsParams``."""
_KINDS = {"json_schema": "json", "regex": "regex", "lark": "grammar"}


def sampling_of(
    params: SamplingParams, ends: frozenset[int], *, num_output_tokens: int = 0
) -> dict[str, Any]:
    """``ends``: the model's ends of sequence. ``num_output_tokens``: how many of the prompt's last tokens are
    output already. Raises :class:`InvalidRequest` with the name of the field."""
    grammar = params.grammar
    stops = set(params.stop_token_ids)
    if params.ends_by_eos():
        stops |= ends
    sampling: dict[str, Any] = {
        # 0: the prompt alone; vLLM always samples one, which is thrown away.
        "max_tokens": max(1, params.max_tokens - num_output_tokens),
        "min_tokens": max(0, params.min_tokens - num_output_tokens),
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
        "min_p": params.min_p,
        "repetition_penalty": params.repetition_penalty,
        "presence_penalty": params.presence_penalty,
        "frequency_penalty": params.frequency_penalty,
        # A generator of its own costs a row of a batch; greedy rows need none.
        "seed": params.seed if params.temperature > 0 else None,
        "logprobs": params.logprobs,
        "stop_token_ids": sorted(stops),
        # Which ids end a sequence is ours to say, as above; only a grammar needs the tokenizer's own.
        "ignore_eos": grammar is None,
        "detokenize": False,
    }
    if params.logit_bias:
        sampling["logit_bias"] = dict(params.logit_bias)
    if params.prompt_logprobs is not None and not num_output_tokens:
        sampling["prompt_logprobs"] = params.prompt_logprobs
    if grammar is not None:
        sampling[STRUCTURED] = structured_of(grammar)
    return sampling


def first_of(params: SamplingParams, ends: frozenset[int], *, num_output_tokens: int = 0) -> dict[str, Any]:
    """Of a send that samples the first token, and no other."""
    sampling = sampling_of(params, ends, num_output_tokens=num_output_tokens)
    sampling.pop("prompt_logprobs", None)
    return {**sampling, "max_tokens": 1, "min_tokens": min(1, sampling["min_tokens"])}


def probe_of() -> dict[str, Any]:
    """Of a request whose token nobody wants: one that is parked, or sends."""
    return {"max_tokens": 1, "temperature": 0.0, "ignore_eos": True, "detokenize": False}


def structured_of(grammar: Grammar) -> dict[str, Any]:
    if grammar.after_token_ids:
        raise InvalidRequest(
            "this engine (vLLM) begins a grammar at the first token of the output",
            field="grammar",
        )
    if grammar.kind == "json_object":
        return {"json_object": True}
    if grammar.kind == "choice":
        try:
            return {"choice": msgspec.json.decode(grammar.text, type=list[str])}
        except msgspec.DecodeError as error:
            raise InvalidRequest(
                f"grammar: a choice is a JSON list of strings: {error}", field="grammar"
            ) from None
    return {_KINDS[grammar.kind]: grammar.text}
