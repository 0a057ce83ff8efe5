"""A body -> a request in the core's own words, and what of it a response tells again. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from microserve.gateway.api.parse import check_supported
from microserve.gateway.grammar import asked
from microserve.gateway.grammar.asked import Asked
from microserve.gateway.request.attributes import FIELDS, METADATA
from microserve.gateway.request.request import (
    Conversation,
    GenerateRequest,
    SamplingWish,
    TemplateOption,
)
from microserve.gateway.responses.items import turns_of
from microserve.gateway.responses.keeping import context_of, history_of, items_of
from microserve.gateway.responses.schema import ResponsesRequest
from microserve.gateway.responses.tools import tool_use_of
from microserve.protocol.errors import InvalidRequest

LOGPROBS, ENCRYPTED = "message.output_text.logprobs", "reasoning.encrypted_content"
NOTHING: Mapping[str, bytes] = {}
NAMES = {"prompt": "input", "max_tokens": "max_output_tokens"}


def responses_request(body: ResponsesRequest, kept: Mapping[str, bytes] = NOTHING) -> GenerateRequest:
    """``kept``: as :func:`names_of` says. Raises :class:`InvalidRequest` naming the item or the field."""
    if body.stream_options is not None:
        check_supported(body.stream_options, "stream_options.")
        if not body.stream:
            raise InvalidRequest("stream_options needs stream", field="stream_options")
    history, items = history_of(body, kept), items_of(body, kept)
    if not history and not items:
        raise InvalidRequest("input is missing", field="input")
    return GenerateRequest(
        model=body.model,
        prompt=Conversation(turns_of(body.instructions, history, items), _options(body)),
        sampling=_sampling(body),
        stop=[body.stop] if isinstance(body.stop, str) else body.stop or [],
        stream=bool(body.stream),
        grammar=_grammar(body),
        tools=tool_use_of(body),
        salt=body.cache_salt or "",
        labels={name: each for name in (*FIELDS, METADATA) if (each := getattr(body, name)) is not None},
        echo={"response": told_again(body), "encrypts": ENCRYPTED in (body.include or [])},
        context=b"" if body.store is False else context_of([*history, *items]),
        names=NAMES,
    )


def _sampling(body: ResponsesRequest) -> SamplingWish:
    logprobs = body.top_logprobs or None
    if logprobs is None and LOGPROBS in (body.include or []):
        logprobs = 0
    return SamplingWish(
        max_tokens=body.max_output_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        min_p=body.min_p,
        min_tokens=body.min_tokens,
        ignore_eos=bool(body.ignore_eos),
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        seed=body.seed,
        logprobs=logprobs,
    )


def _options(body: ResponsesRequest) -> dict[str, TemplateOption]:
    """What the template is to know beside the turns."""
    options: dict[str, TemplateOption] = {}
    if body.reasoning is not None:
        check_supported(body.reasoning, "reasoning.")
        if body.reasoning.effort is not None:
            options["reasoning_effort"] = TemplateOption(body.reasoning.effort, "reasoning.effort")
    verbosity = None if body.text is None else body.text.verbosity
    if verbosity not in (None, "medium"):
        options["verbosity"] = TemplateOption(verbosity, "text.verbosity")
    return options


def _grammar(body: ResponsesRequest) -> Asked | None:
    wish = None if body.text is None else body.text.format
    if wish is None or wish.type == "text":
        return None
    field = "text.format"
    if wish.type == "json_object":
        return asked.json_object(field)
    if wish.type == "json_schema":
        if wish.schema is None:
            raise InvalidRequest("text.format.schema is missing", field="text.format.schema")
        return asked.json_schema("text.format.schema", wish.schema, is_strict=bool(wish.strict))
    raise InvalidRequest(
        f"text.format.type {wish.type[:64]!r} is not supported: text, json_object and json_schema are",
        field="text.format.type",
    )


def told_again(body: ResponsesRequest) -> dict[str, Any]:
    """Members of a response that are the request's own, with what stands for those that it has not."""
    text, reasoning = body.text, body.reasoning
    wish = None if text is None or text.format is None else msgspec.to_builtins(text.format)
    return {
        "instructions": body.instructions,
        "previous_response_id": body.previous_response_id,
        "tools": [
            {
                "type": "function",
                "name": tool.name,
                "description": tool.description,
                "parameters": tool.parameters,
                "strict": tool.strict,
            }
            for tool in body.tools or []
        ],
        "tool_choice": "auto" if body.tool_choice is None else msgspec.to_builtins(body.tool_choice),
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "text": {
            "format": wish or {"type": "text"},
            "verbosity": "medium" if text is None or text.verbosity is None else text.verbosity,
        },
        "reasoning": {"effort": None if reasoning is None else reasoning.effort, "summary": None},
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "truncation": "disabled",
        "background": False,
        "store": body.store is not False,
        "service_tier": "default",
        "metadata": body.metadata or {},
        "safety_identifier": body.safety_identifier,
        "prompt_cache_key": body.prompt_cache_key,
        "user": body.user,
        "top_logprobs": body.top_logprobs or 0,
    }
