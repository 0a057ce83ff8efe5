"""A body -> the core's ``GenerateRequest``. Pure functions.

Owns what fields come to that are neither turns nor tools: sampling, the form of an answer, how it thinks.
"""

from __future__ import annotations

from microserve.gateway.anthropic.conversation import turns_of
from microserve.gateway.anthropic.schema import (
    CountTokensRequest,
    MessagesRequest,
    ThinkingAdaptive,
    ThinkingDisabled,
    ThinkingEnabled,
)
from microserve.gateway.anthropic.tools import tool_use_of
from microserve.gateway.grammar.asked import Asked, json_schema, one_of
from microserve.gateway.request.request import (
    Conversation,
    GenerateRequest,
    SamplingWish,
    TemplateOption,
)

NAMES = {"prompt": "messages", "stop": "stop_sequences", "user": "metadata.user_id"}
"""What is called otherwise here than in the core."""


def into_request(body: MessagesRequest) -> GenerateRequest:
    """Raises :class:`InvalidRequest` naming the field."""
    request = into_counted(body)
    request.sampling = SamplingWish(
        max_tokens=body.max_tokens,
        is_max_cut=True,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
    )
    request.stop = list(body.stop_sequences or ())
    request.stream = bool(body.stream)
    request.labels = _labels(body)
    return request


def into_counted(body: CountTokensRequest) -> GenerateRequest:
    """All that the prompt is made of, so that counting it is counting what would be computed."""
    thinking, turns = body.thinking, turns_of(body.system, body.messages)
    request = GenerateRequest(
        model=body.model,
        prompt=Conversation(
            turns, _options(body), continues=turns[-1].role == "assistant", folds_system=True
        ),
        grammar=_grammar(body),
        tools=tool_use_of(body),
        names=NAMES,
    )
    if isinstance(thinking, ThinkingEnabled):
        request.warnings.append("thinking.budget_tokens is not enforced")
    if isinstance(thinking, ThinkingEnabled | ThinkingAdaptive):
        request.hides_thoughts = thinking.display == "omitted"
    return request


def _options(body: CountTokensRequest) -> dict[str, TemplateOption]:
    """Hints: models think as they do, and agents ask for it whatever the model is."""
    options = {}
    if body.thinking is not None:
        thinks = not isinstance(body.thinking, ThinkingDisabled)
        options["enable_thinking"] = TemplateOption(thinks, "thinking", is_hint=True)
    if body.output_config is not None and (effort := body.output_config.effort) is not None:
        options["reasoning_effort"] = TemplateOption(effort, "output_config.effort", is_hint=True)
    return options


def _grammar(body: CountTokensRequest) -> Asked | None:
    wishes = {"output_format": body.output_format}
    if body.output_config is not None:
        wishes = {"output_config.format": body.output_config.format, **wishes}
    return one_of(
        [
            json_schema(field, wish.schema, is_strict=True)
            for field, wish in wishes.items()
            if wish is not None
        ]
    )


def _labels(body: MessagesRequest) -> dict[str, object]:
    labels: dict[str, object] = {}
    if body.service_tier is not None:
        labels["service_tier"] = body.service_tier
    if body.metadata is not None:
        labels["metadata"] = body.metadata
        if isinstance(body.metadata, dict) and body.metadata.get("user_id") is not None:
            labels["user"] = body.metadata["user_id"]
    return labels
