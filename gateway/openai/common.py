"""What both kinds of completion ask for alike -> the core's words. Pure."""

from __future__ import annotations

from typing import Any

from microserve.gateway.openai.schema import GenerationRequest
from microserve.gateway.request.attributes import FIELDS, METADATA
from microserve.gateway.request.request import SamplingWish
from microserve.gateway.text.options import TextOptions
from microserve.protocol.errors import InvalidRequest

FLEX = "flex"
"""OpenAI's name for requests that can wait."""


def options_of(request: GenerationRequest) -> dict[str, Any]:
    """Members of a ``GenerateRequest``. Raises :class:`InvalidRequest` naming the field."""
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest("stream_options needs stream", field="stream_options")
    if request.truncate_prompt_tokens == 0:
        raise InvalidRequest("truncate_prompt_tokens leaves nothing", field="truncate_prompt_tokens")
    if request.prompt_logprobs is not None and request.stream:
        raise InvalidRequest("prompt_logprobs are not told of a stream", field="prompt_logprobs")
    labels = {name: value for name in (*FIELDS, METADATA) if (value := getattr(request, name)) is not None}
    return {
        "model": request.model,
        "n": 1 if request.n is None else request.n,
        "stop": [request.stop] if isinstance(request.stop, str) else request.stop or [],
        "stream": bool(request.stream),
        "shows_usage": bool(request.stream_options and request.stream_options.include_usage),
        "salt": request.cache_salt or "",
        "names_by_id": bool(request.return_tokens_as_token_ids),
        "labels": labels,
        "text": _text_options(request),
        "truncate_prompt_tokens": request.truncate_prompt_tokens,
        "gives_way": (request.priority or 0) + (request.service_tier == FLEX),
        "warnings": _warnings(request),
    }


def _text_options(request: GenerationRequest) -> TextOptions:
    return TextOptions(
        skip_special_tokens=request.skip_special_tokens is not False,
        spaces_between_special_tokens=request.spaces_between_special_tokens is not False,
        include_stop=bool(request.include_stop_str_in_output),
    )


def _warnings(request: GenerationRequest) -> list[str]:
    """Wishes that change no token and are not fulfilled."""
    found = []
    if request.store:
        found.append("store: nothing is stored here")
    if request.prediction is not None:
        found.append("prediction: makes nothing faster here")
    if request.stream_options is not None and request.stream_options.continuous_usage_stats:
        found.append("stream_options.continuous_usage_stats: usage comes with the last chunk")
    return found


def wish_of(
    request: GenerationRequest,
    *,
    max_tokens: int | None,
    logprobs: int | None,
    default_max_tokens: int | None = None,
) -> SamplingWish:
    return SamplingWish(
        max_tokens=max_tokens,
        default_max_tokens=default_max_tokens,
        min_tokens=request.min_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        min_p=request.min_p,
        repetition_penalty=request.repetition_penalty,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        logit_bias=request.logit_bias,
        seed=request.seed,
        logprobs=logprobs,
        prompt_logprobs=request.prompt_logprobs,
        stop_token_ids=request.stop_token_ids or [],
        ignore_eos=bool(request.ignore_eos),
    )
