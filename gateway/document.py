"""``/openapi.json``: the API, made of the types that parse requests, with the bounds that hold here.

Owns the table of paths beside the routes (a test holds one against the other) and the words of the document.
What depends on settings and on the model is filled in when it is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import msgspec

from microserve.gateway.anthropic.replies import CountReply, MessageReply, MessagesErrorEnvelope
from microserve.gateway.anthropic.schema import CountTokensRequest, MessagesRequest
from microserve.gateway.openai import replies
from microserve.gateway.openai.schema import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from microserve.gateway.request.request import MAX_CHOICES
from microserve.gateway.responses.described import describe
from microserve.gateway.responses.replies import DeletedResponse, InputItemList, ResponseReply
from microserve.gateway.responses.schema import ResponsesRequest
from microserve.gateway.routers.link import ModelLimits
from microserve.gateway.view import forms
from microserve.protocol.messages.request.sampling import MAX_COUNT, MAX_TOKEN_ID

_SCHEMAS = "#/components/schemas/{name}"
_JSON, _SSE, _TEXT = "application/json", "text/event-stream", "text/plain; version=0.0.4"
_CONTEXT_FIELDS = ("max_tokens", "max_completion_tokens", "max_output_tokens", "min_tokens")
_EXACT = (
    "true: nothing that the answer is made from loses anything on its way between engines, whatever key and "
    "strategy say; false: it may."
)
_HEADERS: dict[str, tuple[str, dict[str, Any]]] = {
    "x-request-id": ("Echoed, and found in every service's log.", {"type": "string"}),
    "x-microserve-timeout-s": (
        "Seconds that the answer may take; then it ends with what there is.",
        {"type": "number", "minimum": 0.001},
    ),
    "x-microserve-strategy": (
        "The strategy that is to serve it.",
        {"type": "string", "pattern": "^[A-Za-z0-9._:/+=@-]{1,128}$"},
    ),
    "x-microserve-exact": (_EXACT, {"type": "string", "enum": ["true", "false"]}),
}
_PROMISE = (
    "The numerics class in which the whole answer was made, bit for bit as any engine of the class makes it; "
    "or none. Of a stream: its beginning's; each choice's last chunk has the choice's, as microserve.exact."
)
_WARNING = "What was asked for and is not done as asked: unknown fields by their places, what is relaxed."


@dataclass(frozen=True, slots=True)
class Operation:
    """What one path does with one method."""

    path: str
    summary: str
    reply: type[msgspec.Struct] | None = None
    """None: as ``reply_type`` says."""
    request: type[msgspec.Struct] | None = None
    reply_type: str = _JSON
    streams: bool = False
    is_open: bool = False
    """Also without a key."""
    is_503_a_reply: bool = False
    deletes: bool = False
    query: tuple[str, ...] = ()
    """Names of what may stand behind the path."""
    error: type[msgspec.Struct] = replies.ErrorEnvelope


OPERATIONS = (
    Operation("/v1/chat/completions", "Answer a conversation.", replies.ChatReply, ChatRequest, streams=True),
    Operation(
        "/v1/completions", "Go on with a text.", replies.CompletionReply, CompletionRequest, streams=True
    ),
    Operation("/v1/responses", "Answer items.", ResponseReply, ResponsesRequest, streams=True),
    Operation("/v1/responses/{response_id}", "A response that is kept.", ResponseReply),
    Operation("/v1/responses/{response_id}", "Throw it away.", DeletedResponse, deletes=True),
    Operation(
        "/v1/responses/{response_id}/input_items",
        "What it was made of.",
        InputItemList,
        query=("order", "limit", "after"),
    ),
    Operation(
        "/v1/messages",
        "Answer a conversation, as Anthropic has it.",
        MessageReply,
        MessagesRequest,
        streams=True,
        error=MessagesErrorEnvelope,
    ),
    Operation(
        "/v1/messages/count_tokens",
        "How long its prompt is.",
        CountReply,
        CountTokensRequest,
        error=MessagesErrorEnvelope,
    ),
    Operation("/v1/models", "The models that are served.", replies.ModelList),
    Operation("/v1/models/{model_id}", "One of them.", replies.ModelCard),
    Operation("/tokenize", "Token ids of a prompt or of messages.", replies.TokenizeReply, TokenizeRequest),
    Operation("/detokenize", "Text of token ids.", replies.DetokenizeReply, DetokenizeRequest),
    Operation(
        "/tokenizer_info", "The tokenizer's special tokens and chat template.", replies.TokenizerInfoReply
    ),
    Operation("/health", "The process answers.", is_open=True),
    Operation(
        "/ready", "A router with an engine is known.", replies.ReadyReply, is_open=True, is_503_a_reply=True
    ),
    Operation("/metrics", "Prometheus metrics; ?names=vllm.", reply_type=_TEXT),
    Operation("/view/mesh", "Engines, links, and the last quarter of an hour of each.", forms.MeshForm),
    Operation(
        "/view/requests",
        "Requests that run, and those of the last quarter of an hour.",
        forms.RequestsForm,
        query=("order", "limit", "min_s", "key", "strategy", "engine", "code"),
    ),
    Operation(
        "/view/requests/{request_id}", "One of them taken apart, and why it went there.", forms.RequestDetail
    ),
    Operation("/view/strategies", "What serves, who changed it, and how it fares.", forms.StrategiesForm),
    Operation("/view/keys", "What each API key has used, and what is left.", forms.KeysForm),
    Operation("/view/health", "What is wrong now.", forms.HealthForm),
    Operation("/view/feed", "What changes, as events: a snapshot, then deltas.", reply_type=_SSE),
    Operation("/version", "The version.", replies.VersionReply),
    Operation("/server_info", "For SGLang's router.", replies.ServerInfoReply),
    Operation("/get_server_info", "The same.", replies.ServerInfoReply),
    Operation("/model_info", "For SGLang's router.", replies.ModelInfoReply),
    Operation("/get_model_info", "The same.", replies.ModelInfoReply),
    Operation("/flush_cache", "Not offered: 404, code not_offered."),
    Operation("/openapi.json", "This document."),
)


@lru_cache(maxsize=8)
def document(
    version: str, models: tuple[str, ...], max_n: int, limits: ModelLimits, num_texts: int, needs_key: bool
) -> bytes:
    """The document as JSON. ``limits`` may be unknown: then the model's bounds are those of the wire.
    ``models``: what a request may name; ``num_texts``: ids that have a text, which are not all of a model's,
    or more."""
    kinds = [kind for each in OPERATIONS for kind in (each.request, each.reply) if kind is not None]
    errors = dict.fromkeys(each.error for each in OPERATIONS)
    _, schemas = msgspec.json.schema_components([*kinds, *errors], ref_template=_SCHEMAS)
    for kind, ids in (
        (ChatRequest, limits.vocab_size),
        (CompletionRequest, limits.vocab_size),
        (ResponsesRequest, limits.vocab_size),
        (TokenizeRequest, 0),
        (DetokenizeRequest, num_texts),
        (MessagesRequest, 0),
        (CountTokensRequest, 0),
    ):
        is_cut = kind is MessagesRequest  # what the context has no room for is no mistake there
        _fill_in(schemas[kind.__name__], models, max_n, ids, 0 if is_cut else limits.max_model_len)
    describe(schemas)
    schemas["Message"] = _message(schemas["Message"])
    schemas["TokenizeRequest"]["anyOf"] = [{"required": [each]} for each in ("prompt", "messages")]
    schemas["ContentPart"]["properties"]["text"] = {"type": "string"}
    schemas["ContentPart"]["required"] = ["type", "text"]
    whole: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "MicroServe",
            "version": version,
            "description": "The APIs of OpenAI and Anthropic. Unlisted fields are ignored; bodies are JSON.",
        },
        "paths": _paths(),
        "components": {"schemas": schemas},
    }
    if needs_key:
        whole["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        whole["security"] = [{"key": []}]
    return msgspec.json.encode(whole)


def _paths() -> dict[str, Any]:
    paths: dict[str, Any] = {}
    for each in OPERATIONS:
        paths.setdefault(each.path, {}).update(_path(each))
    return paths


def _path(operation: Operation) -> dict[str, Any]:
    described: dict[str, Any] = {"summary": operation.summary, "responses": _responses(operation)}
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in ("model_id", "response_id")
        if f"{{{name}}}" in operation.path
    ]
    parameters += [{"name": name, "in": "query", "schema": {"type": "string"}} for name in operation.query]
    if operation.streams:
        parameters += [
            {"name": name, "in": "header", "description": text, "schema": schema}
            for name, (text, schema) in _HEADERS.items()
        ]
    if parameters:
        described["parameters"] = parameters
    if operation.is_open:
        described["security"] = []
    if operation.request is None:
        return {"delete" if operation.deletes else "get": described}
    described["requestBody"] = {"required": True, "content": {_JSON: {"schema": _ref(operation.request)}}}
    return {"post": described}


def _responses(operation: Operation) -> dict[str, Any]:
    schema = {"type": "object"} if operation.reply is None else _ref(operation.reply)
    if operation.reply_type != _JSON:
        schema = {"type": "string"}
    content: dict[str, Any] = {operation.reply_type: {"schema": schema}}
    if operation.streams:
        # Of an event or of the whole stream: readers of this version of OpenAPI differ about that.
        content[_SSE] = {
            "schema": {"description": "Each event's data is a chunk as JSON, the last one [DONE]."}
        }
    error = {"description": "What is wrong.", "content": {_JSON: {"schema": _ref(operation.error)}}}
    reply: dict[str, Any] = {"description": "The answer.", "content": content}
    if operation.request is not None:
        reply["headers"] = {
            "x-microserve-warning": {"description": _WARNING, "schema": {"type": "string"}},
        }
    if operation.streams:
        reply["headers"]["x-microserve-exact"] = {"description": _PROMISE, "schema": {"type": "string"}}
    found = {"200": reply, "4XX": error, "5XX": error}
    if operation.is_503_a_reply:
        found["503"] = {"description": "Not now.", "content": content}
    return found


def _ref(kind: type[msgspec.Struct]) -> dict[str, str]:
    return {"$ref": _SCHEMAS.format(name=kind.__name__)}


def _fill_in(
    schema: dict[str, Any], models: tuple[str, ...], max_n: int, num_ids: int, max_model_len: int
) -> None:
    """Bounds that a request's type cannot know; zeros are not known here either."""
    for name, field in schema["properties"].items():
        for part in _parts(field):
            if name == "model" and part.get("type") == "string":
                part["enum"] = list(models)
            if name == "n" and part.get("maximum") == MAX_CHOICES:
                part["maximum"] = max_n
            if num_ids and part.get("maximum") == MAX_TOKEN_ID:
                part["maximum"] = num_ids - 1
            if max_model_len and name in _CONTEXT_FIELDS and part.get("maximum") == MAX_COUNT:
                part["maximum"] = max_model_len - 1


def _message(schema: dict[str, Any]) -> dict[str, Any]:
    """Only the assistant's turn may be without content: two fields together, which one type cannot say."""
    fields = schema["properties"]
    roles = set(fields["role"]["enum"]) - {"assistant"}
    content = {"anyOf": [each for each in fields["content"]["anyOf"] if each.get("type") != "null"]}
    return {
        "title": "Message",
        "anyOf": [
            {**schema, "properties": {**fields, "role": {"const": "assistant"}}},
            {
                **schema,
                "properties": {
                    **fields,
                    "role": {"enum": sorted(roles)},
                    "content": content,
                    "tool_calls": {"anyOf": [{"type": "null"}, {"type": "array", "maxItems": 0}]},
                },
                "required": ["role", "content"],
            },
        ],
    }


def _parts(schema: Any) -> list[dict[str, Any]]:
    """A schema and all that are in it."""
    if isinstance(schema, list):
        return [part for each in schema for part in _parts(each)]
    if not isinstance(schema, dict):
        return []
    return [schema, *(part for each in schema.values() for part in _parts(each))]
