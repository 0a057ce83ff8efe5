"""A completion request's numbers -> ``SamplingParams`` and everything else that shapes one generation.

Owns defaults, and the limits that depend on the model (context length, vocabulary), on settings, or on two
fields together; those of one field are in ``schema.py``. Pure functions.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import TypeVar

from microserve.gateway.openai.defaults import SamplingDefaults
from microserve.gateway.openai.schema import ChatRequest, CompletionRequest, GenerationRequest
from microserve.gateway.routers.link import ModelLimits
from microserve.protocol.errors import InvalidRequest, PromptTooLong
from microserve.protocol.messages.sampling import SamplingParams

DEFAULT_COMPLETION_TOKENS = 16
NO_DEFAULTS = SamplingDefaults()
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
    if n > max_n:
        raise InvalidRequest(f"n must be between 1 and {max_n}", field="n")
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest("stream_options needs stream", field="stream_options")
    stop = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())
    return GenerationOptions(
        n=n,
        stream=bool(request.stream),
        include_usage=bool(request.stream_options and request.stream_options.include_usage),
        stop=stop,
        salt=request.cache_salt or "",
    )


def sampling_of(
    request: GenerationRequest,
    limits: ModelLimits,
    longest_prompt: int,
    defaults: SamplingDefaults = NO_DEFAULTS,
) -> SamplingParams:
    """Sampling of the request's first choice; ``longest_prompt`` in tokens.

    Raises :class:`PromptTooLong`, or :class:`InvalidRequest` naming the field as the client wrote it.
    """
    context, room = limits.max_model_len, limits.max_model_len - longest_prompt
    if room < 1:
        raise PromptTooLong(
            f"this model's maximum context length is {context} tokens; the prompt has {longest_prompt}, "
            "and at least one must be left for output",
            field=request.prompt_field,
        )
    field, max_tokens = _max_tokens(request)
    if max_tokens is None:
        is_text = isinstance(request, CompletionRequest)
        default = DEFAULT_COMPLETION_TOKENS if is_text else _or(defaults.max_new_tokens, room)
        max_tokens = min(default, room)
    elif max_tokens > room:
        raise PromptTooLong(
            f"this model's maximum context length is {context} tokens; {field} is {max_tokens}, and the "
            f"prompt's {longest_prompt} leave only {room}",
            field=field,
        )
    top_k = _or(request.top_k, _or(defaults.top_k, 0))
    sampling = SamplingParams(
        max_tokens=max_tokens,
        min_tokens=_or(request.min_tokens, 0),
        temperature=_or(request.temperature, _or(defaults.temperature, 1.0)),
        top_p=_or(request.top_p, _or(defaults.top_p, 1.0)),
        top_k=max(top_k, 0),  # vLLM's "off" is -1
        min_p=_or(request.min_p, _or(defaults.min_p, 0.0)),
        repetition_penalty=_or(request.repetition_penalty, _or(defaults.repetition_penalty, 1.0)),
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
    return seed % SEED_MODULUS


def _logprobs(request: GenerationRequest) -> int | None:
    if isinstance(request, ChatRequest):
        top = request.top_logprobs
        if top is not None and not request.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs", field="top_logprobs")
        return (top or 0) if request.logprobs else None
    return request.logprobs if isinstance(request, CompletionRequest) else None
