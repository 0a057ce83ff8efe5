"""A request's wishes -> ``SamplingParams``, which engines are told.

Owns the limits that depend on the model (context length, vocabulary) or on settings; those of one field are
with the types of bodies. Pure functions.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import TypeVar

from microserve.gateway.request.defaults import SamplingDefaults
from microserve.gateway.request.request import GenerateRequest
from microserve.gateway.routers.link import ModelLimits
from microserve.protocol.errors import InvalidRequest, PromptTooLong
from microserve.protocol.messages.request.sampling import SamplingParams

NO_DEFAULTS = SamplingDefaults()
MAX_PROMPT_PAIRS = 1 << 20
"""Tokens with a log-probability beside prompts of one HTTP request: each is an object until it is written."""
SEED_MODULUS = 1 << 63

T = TypeVar("T")


def check_choices(request: GenerateRequest, max_n: int) -> None:
    """Raises :class:`InvalidRequest` naming the field."""
    for name, count in (("n", request.n), ("best_of", request.best_of or 1)):
        if count > max_n:
            field = request.name_of(name)
            raise InvalidRequest(f"{field} must be between 1 and {max_n}", field=field)


def check_prompts(
    request: GenerateRequest, sampling: SamplingParams, prompts: Sequence[Sequence[int]]
) -> None:
    """Raises :class:`InvalidRequest` for more log-probabilities of prompts than are told at a time."""
    if sampling.prompt_logprobs is not None:
        # Each choice tells of its prompt anew.
        num_pairs = (1 + sampling.prompt_logprobs) * sum(map(len, prompts)) * request.num_generated
        if num_pairs > MAX_PROMPT_PAIRS:
            raise InvalidRequest(
                f"{num_pairs} log-probabilities of prompts are asked for, at most {MAX_PROMPT_PAIRS} told",
                field="logprobs" if request.sampling.prompt_logprobs is None else "prompt_logprobs",
            )


def sampling_of(
    request: GenerateRequest,
    limits: ModelLimits,
    longest_prompt: int,
    defaults: SamplingDefaults = NO_DEFAULTS,
) -> SamplingParams:
    """Sampling of the request's first choice; ``longest_prompt`` in tokens.

    Raises :class:`PromptTooLong`, or :class:`InvalidRequest` naming the field as the client wrote it.
    """
    context, room = limits.max_model_len, limits.max_model_len - longest_prompt
    wish = request.sampling
    if room < 1 and (room < 0 or wish.max_tokens != 0):
        raise PromptTooLong(
            f"this model's maximum context length is {context} tokens; the prompt has {longest_prompt}, "
            "and at least one must be left for output",
            field=request.name_of("prompt"),
        )
    max_tokens = wish.max_tokens
    if max_tokens is None:
        default = _or(wish.default_max_tokens, _or(defaults.max_new_tokens, room))
        max_tokens = min(default, room)
    elif max_tokens > room and wish.is_max_cut:
        max_tokens = room
    elif max_tokens > room:
        field = request.name_of("max_tokens")
        raise PromptTooLong(
            f"this model's maximum context length is {context} tokens; {field} is {max_tokens}, and the "
            f"prompt's {longest_prompt} leave only {room}",
            field=field,
        )
    top_k = _or(wish.top_k, _or(defaults.top_k, 0))
    sampling = SamplingParams(
        max_tokens=max_tokens,
        min_tokens=_or(wish.min_tokens, 0),
        temperature=_or(wish.temperature, _or(defaults.temperature, 1.0)),
        top_p=_or(wish.top_p, _or(defaults.top_p, 1.0)),
        top_k=max(top_k, 0),  # vLLM's "off" is -1
        min_p=_or(wish.min_p, _or(defaults.min_p, 0.0)),
        repetition_penalty=_or(wish.repetition_penalty, _or(defaults.repetition_penalty, 1.0)),
        presence_penalty=_or(wish.presence_penalty, 0.0),
        frequency_penalty=_or(wish.frequency_penalty, 0.0),
        logit_bias=wish.logit_bias or {},
        seed=_seed(wish.seed),
        logprobs=_logprobs(request),
        stop_token_ids=tuple(wish.stop_token_ids),
        ignore_eos=wish.ignore_eos,
        prompt_logprobs=_prompt_logprobs(request),
    )
    sampling.validate(limits.vocab_size)
    return sampling


def seed_of(first: int, index: int) -> int:
    """Seed of the choice ``index``: independent streams, and the same ones for the same request."""
    return (first + index) % SEED_MODULUS


def _logprobs(request: GenerateRequest) -> int | None:
    """Which of several choices is likely is known by them."""
    return _or(request.sampling.logprobs, None if request.num_generated == request.n else 0)


def _prompt_logprobs(request: GenerateRequest) -> int | None:
    """For those that the client asks for, and those of an echo."""
    asked = [request.sampling.prompt_logprobs, request.sampling.logprobs if request.shows_prompt else None]
    return max((count for count in asked if count is not None), default=None)


def _or(value: T | None, default: T) -> T:
    return default if value is None else value


def _seed(seed: int | None) -> int:
    if seed is None:
        return secrets.randbits(63)
    return seed % SEED_MODULUS
