"""A completion request's numbers -> ``SamplingParams`` and everything else that shapes one generation.

Owns defaults and the limits that depend on the model (context length, vocabulary). Pure functions.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import TypeVar

from microserve.gateway.openai.schema import ChatRequest, CompletionRequest, GenerationRequest
from microserve.gateway.routers.link import ModelLimits
from microserve.protocol.errors import InvalidRequest, PromptTooLong
from microserve.protocol.messages.sampling import MAX_LOGPROBS, SamplingParams

DEFAULT_COMPLETION_TOKENS = 16
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 1024
MAX_SALT_CHARS = 256
MAX_CHOICES = 256
"""Prompts times ``n`` of one HTTP request."""
SEED_MODULUS = 1 << 63

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class GenerationOptions:
    """One HTTP request's wishes beside the sampling of each choice."""

    n: int
    stream: bool
    include_usage: bool
    stop: tuple[str, ...]
    salt: str


def options_of(request: GenerationRequest, max_n: int) -> GenerationOptions:
    """Raises :class:`InvalidRequest` naming the field."""
    n = 1 if request.n is None else request.n
    if not 1 <= n <= max_n:
        raise InvalidRequest(f"n must be between 1 and {max_n}", field="n")
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest("stream_options needs stream", field="stream_options")
    stop = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())
    if len(stop) > MAX_STOP_STRINGS:
        raise InvalidRequest(f"stop must have at most {MAX_STOP_STRINGS} strings", field="stop")
    if not all(1 <= len(text) <= MAX_STOP_CHARS for text in stop):
        raise InvalidRequest(f"stop strings must have 1 to {MAX_STOP_CHARS} characters", field="stop")
    salt = request.cache_salt or ""
    if len(salt) > MAX_SALT_CHARS:
        raise InvalidRequest(f"cache_salt must have at most {MAX_SALT_CHARS} characters", field="cache_salt")
    return GenerationOptions(
        n=n,
        stream=bool(request.stream),
        include_usage=bool(request.stream_options and request.stream_options.include_usage),
        stop=stop,
        salt=salt,
    )


def sampling_of(request: GenerationRequest, limits: ModelLimits, longest_prompt: int) -> SamplingParams:
    """Sampling of the request's first choice; ``longest_prompt`` in tokens.

    Raises :class:`PromptTooLong`, or :class:`InvalidRequest` naming the field as the client wrote it.
    """
    room = limits.max_model_len - longest_prompt
    if room < 1:
        raise PromptTooLong(
            f"the prompt has {longest_prompt} tokens; the model's context is {limits.max_model_len}, "
            "of which at least one must be left for output"
        )
    field, max_tokens = _max_tokens(request)
    if max_tokens is None:
        default = DEFAULT_COMPLETION_TOKENS if isinstance(request, CompletionRequest) else room
        max_tokens = min(default, room)
    elif max_tokens < 1:
        raise InvalidRequest(f"{field} must be at least 1", field=field)
    elif max_tokens > room:
        raise InvalidRequest(
            f"{field} is {max_tokens}, but the prompt's {longest_prompt} tokens leave only {room} of the "
            f"model's context of {limits.max_model_len}",
            field=field,
        )
    top_k = request.top_k
    sampling = SamplingParams(
        max_tokens=max_tokens,
        min_tokens=_or(request.min_tokens, 0),
        temperature=_or(request.temperature, 1.0),
        top_p=_or(request.top_p, 1.0),
        top_k=0 if top_k is None or top_k == -1 else top_k,  # vLLM's "off" is -1
        min_p=_or(request.min_p, 0.0),
        repetition_penalty=_or(request.repetition_penalty, 1.0),
        presence_penalty=_or(request.presence_penalty, 0.0),
        frequency_penalty=_or(request.frequency_penalty, 0.0),
        logit_bias=request.logit_bias or {},
        seed=_seed(request.seed),
        logprobs=_logprobs(request),
        stop_token_ids=tuple(request.stop_token_ids or ()),
        ignore_eos=bool(request.ignore_eos),
    )
    sampling.validate(limits.vocab_size)
    return sampling


def seed_of(first: int, index: int) -> int:
    """Seed of the choice ``index``: independent streams, and the same ones for the same request."""
    return (first + index) % SEED_MODULUS


def _or(value: T | None, default: T) -> T:
    return default if value is None else value


def _max_tokens(request: GenerationRequest) -> tuple[str, int | None]:
    if isinstance(request, ChatRequest) and request.max_completion_tokens is not None:
        return "max_completion_tokens", request.max_completion_tokens
    return "max_tokens", request.max_tokens


def _seed(seed: int | None) -> int:
    if seed is None:
        return secrets.randbits(63)
    if not -SEED_MODULUS <= seed < SEED_MODULUS:
        raise InvalidRequest("seed must fit 64 bits, signed", field="seed")
    return seed % SEED_MODULUS


def _logprobs(request: GenerationRequest) -> int | None:
    if isinstance(request, ChatRequest):
        top = request.top_logprobs
        if top is not None and not request.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs", field="top_logprobs")
        if top is not None and not 0 <= top <= MAX_LOGPROBS:
            raise InvalidRequest(f"top_logprobs must be between 0 and {MAX_LOGPROBS}", field="top_logprobs")
        return (top or 0) if request.logprobs else None
    return request.logprobs if isinstance(request, CompletionRequest) else None
