"""The fields that say what an answer must be -> what is asked for. Pure.

Owns which fields these are: OpenAI's ``response_format``, vLLM's ``structured_outputs`` and its older
``guided_*``. A field that would be ignored is refused by name.
"""

from __future__ import annotations

from microserve.gateway.grammar import asked
from microserve.gateway.grammar.asked import Asked
from microserve.gateway.openai.schema import GenerationRequest, ResponseFormat, StructuredOutputs
from microserve.protocol.errors import InvalidRequest


def asked_of(request: GenerationRequest) -> Asked | None:
    """What the request wants its output to be; None: anything. Raises :class:`InvalidRequest`."""
    found = []
    if request.response_format is not None and request.response_format.type != "text":
        found.append(_of_response_format(request.response_format))
    if request.structured_outputs is not None:
        found += _of_structured_outputs(request.structured_outputs)
    if request.guided_json is not None:
        found.append(asked.json_schema("guided_json", request.guided_json))
    if request.guided_regex is not None:
        found.append(asked.text("regex", "guided_regex", request.guided_regex))
    if request.guided_choice is not None:
        found.append(asked.choice("guided_choice", request.guided_choice))
    if request.guided_grammar is not None:
        found.append(asked.text("lark", "guided_grammar", request.guided_grammar))
    return asked.one_of(found)


def _of_response_format(wish: ResponseFormat) -> Asked:
    field = "response_format"
    match wish.type:
        case "json_object":
            return asked.json_object(field)
        case "json_schema":
            if wish.json_schema is None or wish.json_schema.schema is None:
                raise InvalidRequest("response_format.json_schema.schema is missing", field=field)
            is_strict = bool(wish.json_schema.strict)
            return asked.json_schema(field, wish.json_schema.schema, is_strict=is_strict)
        case "structural_tag":
            return asked.structural_tag(field, {"structures": wish.structures, "triggers": wish.triggers})
    raise InvalidRequest(
        f"response_format.type {wish.type[:64]!r} is not supported: text, json_object, json_schema and "
        "structural_tag are",
        field=field,
    )


def _of_structured_outputs(wish: StructuredOutputs) -> list[Asked]:
    field = "structured_outputs"
    found = []
    if wish.json is not None:
        found.append(asked.json_schema(f"{field}.json", wish.json))
    if wish.regex is not None:
        found.append(asked.text("regex", f"{field}.regex", wish.regex))
    if wish.choice is not None:
        found.append(asked.choice(f"{field}.choice", wish.choice))
    if wish.grammar is not None:
        found.append(asked.text("lark", f"{field}.grammar", wish.grammar))
    if wish.json_object:
        found.append(asked.json_object(f"{field}.json_object"))
    if wish.structural_tag is not None:
        found.append(asked.structural_tag(f"{field}.structural_tag", wish.structural_tag))
    if not found:
        raise InvalidRequest("structured_outputs asks for nothing", field=field)
    return found
