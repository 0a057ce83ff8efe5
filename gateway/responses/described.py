"""What ``/openapi.json`` says of items where a type of ours cannot: which fields go with which ``type``."""

from __future__ import annotations

from typing import Any

from microserve.gateway.responses.items import ROLES, TEXTS

_NULL = {"type": "null"}


def describe(schemas: dict[str, Any]) -> None:
    """Change the schemas of these bodies in place."""
    body, item = schemas["ResponsesRequest"], schemas["InputItem"]
    body["required"] = [*body["required"], "input"]
    body["properties"]["input"] = {
        "anyOf": [
            {"type": "string"},
            {"type": "array", "items": {"$ref": "#/components/schemas/InputItem"}, "minItems": 1},
        ]
    }
    fields = item["properties"]
    content = _without_null(fields["content"])
    schemas["InputItem"] = {
        "title": "InputItem",
        "anyOf": [
            {
                "type": "object",
                "properties": {
                    "type": {"enum": [None, "message"]},
                    "id": fields["id"],
                    "role": {"enum": list(ROLES)},
                    "content": content,
                },
                "required": ["role", "content"],
            },
            _kind(
                "function_call",
                fields,
                call_id=_without_null(fields["call_id"]),
                name=_without_null(fields["name"]),
                arguments={"type": "string", "contentMediaType": "application/json"},
            ),
            _kind(
                "function_call_output",
                fields,
                call_id=_without_null(fields["call_id"]),
                output=_without_null(fields["output"]),
            ),
            _kind("reasoning", fields, required=False, content=fields["content"], summary=fields["summary"]),
        ],
    }
    schemas["ItemPart"] = {
        "title": "ItemPart",
        "anyOf": [
            {
                "type": "object",
                "required": ["type", "text"],
                "properties": {"type": {"enum": list(TEXTS)}, "text": {"type": "string"}},
            },
            {
                "type": "object",
                "required": ["type", "refusal"],
                "properties": {"type": {"const": "refusal"}, "refusal": {"type": "string"}},
            },
        ],
    }


def _kind(kind: str, fields: dict[str, Any], *, required: bool = True, **members: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"type": {"const": kind}, "id": fields["id"], **members},
        "required": ["type", *(members if required else ())],
    }


def _without_null(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [each for each in schema["anyOf"] if each != _NULL]}
