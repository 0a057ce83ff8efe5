"""What both kinds of completion ask for alike -> the core's words. Pure."""

from __future__ import annotations

from typing import Any

from microserve.gateway.openai.schema import GenerationRequest
from microserve.gateway.request.attributes import FIELDS, METADATA
from microserve.gateway.request.request import SamplingWish
from microserve.protocol.errors import InvalidRequest


def options_of(request: GenerationRequest) -> dict[str, Any]:
    """Members of a ``GenerateRequest``. Raises :class:`InvalidRequest` naming the field."""
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest("stream_options needs stream", field="stream_options")
    labels = {name: value for name in (*FIELDS, METADATA) if (value := getattr(request, name)) is not None}
    return {
        "model": request.model,
        "n": 1 if request.n is None else request.n,
        "stop": [request.stop] if isinstance(request.stop, str) else request.stop or [],
        "stream": bool(request.stream),
        "shows_usage": bool(request.stream_options and request.stream_options.include_usage),
        "salt": request.cache_salt or "",
        "labels": labels,
    }


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
        stop_token_ids=request.stop_token_ids or [],
        ignore_eos=bool(request.ignore_eos),
    )
