"""A request's fields -> the grammar that it asks for, not yet checked. Pure functions.

Owns which fields these are: OpenAI's ``response_format``, vLLM's ``structured_outputs`` and its older
``guided_*``. A field that would be ignored is refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from microserve.gateway.openai.schema import GenerationRequest, ResponseFormat, StructuredOutputs
from microserve.protocol.errors import InvalidRequest
from microserve.protocol.grammar.bounds import check_bounds
from microserve.protocol.grammar.compiled import OPTIONS
from microserve.protocol.messages.sampling import Grammar


@dataclass(frozen=True, slots=True)
class Asked:
    grammar: Grammar
    field: str
    """By which it was asked for, as the client wrote it."""
    is_strict: bool = False
    """Nothing may be relaxed."""


def asked_of(request: GenerationRequest) -> Asked | None:
    """What the request wants its output to be; None: anything. Raises :class:`InvalidRequest`."""
    wishes = [
        *_of_response_format(request.response_format),
        *_of_structured_outputs(request.structured_outputs),
        *_of_schema("guided_json", request.guided_json),
        *_of_text("regex", "guided_regex", request.guided_regex),
        *_of_choice("guided_choice", request.guided_choice),
        *_of_grammar("guided_grammar", request.guided_grammar),
    ]
    if len(wishes) > 1:
        raise InvalidRequest(
            f"{wishes[0].field} and {wishes[1].field} exclude each other", field=wishes[1].field
        )
    return wishes[0] if wishes else None


def _of_response_format(wish: ResponseFormat | None) -> list[Asked]:
    if wish is None or wish.type == "text":
        return []
    field = "response_format"
    match wish.type:
        case "json_object":
            return [Asked(Grammar(kind="json_object"), field)]
        case "json_schema":
            if wish.json_schema is None or wish.json_schema.schema is None:
                raise InvalidRequest("response_format.json_schema.schema is missing", field=field)
            where = f"{field}.json_schema.schema"
            grammar = Grammar(kind="json_schema", text=_schema_text(where, wish.json_schema.schema))
            return [Asked(grammar, field, bool(wish.json_schema.strict))]
        case "structural_tag":
            return [_structural_tag(field, {"structures": wish.structures, "triggers": wish.triggers})]
    raise InvalidRequest(
        f"response_format.type {wish.type[:64]!r} is not supported: text, json_object, json_schema and "
        "structural_tag are",
        field=field,
    )


def _of_structured_outputs(wish: StructuredOutputs | None) -> list[Asked]:
    if wish is None:
        return []
    field = "structured_outputs"
    found = [
        *_of_schema(f"{field}.json", wish.json),
        *_of_text("regex", f"{field}.regex", wish.regex),
        *_of_choice(f"{field}.choice", wish.choice),
        *_of_grammar(f"{field}.grammar", wish.grammar),
    ]
    if wish.json_object:
        found.append(Asked(Grammar(kind="json_object"), f"{field}.json_object"))
    if wish.structural_tag is not None:
        tag = wish.structural_tag
        found.append(
            _structural_tag(f"{field}.structural_tag", _decoded(tag) if isinstance(tag, str) else tag)
        )
    if not found:
        raise InvalidRequest("structured_outputs asks for nothing", field=field)
    return found


def _of_schema(field: str, schema: Any) -> list[Asked]:
    if schema is None:
        return []
    return [Asked(Grammar(kind="json_schema", text=_schema_text(field, schema)), field)]


def _schema_text(field: str, schema: Any) -> str:
    if isinstance(schema, str):  # vLLM takes the text of one, too
        schema = _decoded(schema)
    if not isinstance(schema, dict):
        raise InvalidRequest(f"{field} must be an object", field=field)
    return msgspec.json.encode(schema).decode()


def _of_text(kind: str, field: str, text: str | None) -> list[Asked]:
    if text is None:
        return []
    if not text:
        raise InvalidRequest(f"{field} is empty", field=field)
    return [Asked(Grammar(kind=kind, text=text), field)]


def _of_choice(field: str, choices: list[str] | None) -> list[Asked]:
    if choices is None:
        return []
    return [Asked(Grammar(kind="choice", text=msgspec.json.encode(choices).decode()), field)]


def _of_grammar(field: str, text: str | None) -> list[Asked]:
    """Lark, or GBNF as llama.cpp and xgrammar have it, which becomes Lark in the helper."""
    return _of_text("lark", field, text)


def _structural_tag(field: str, tag: Any) -> Asked:
    from llguidance import StructTag

    try:
        tags = msgspec.convert(tag, _StructuralTag)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"{field}: {error}", field=field) from None
    parts = []
    for each in tags.structures:
        trigger = next((one for one in tags.triggers if one and each.begin.startswith(one)), None)
        if trigger is None:
            raise InvalidRequest(f"{field}: no trigger begins {each.begin[:64]!r}", field=field)
        schema = _schema_text(field, each.schema)
        try:
            check_bounds(Grammar(kind="json_schema", text=schema))
        except InvalidRequest as error:
            raise InvalidRequest(f"{field}: {error.detail}", field=field) from None
        ruled = {**each.schema, "x-guidance": OPTIONS}
        parts.append(StructTag(trigger=trigger, begin=each.begin, grammar=ruled, end=each.end))
    return Asked(Grammar(kind="lark", text=StructTag.to_grammar(parts, assume_special=False)), field)


class _Structure(msgspec.Struct, forbid_unknown_fields=True):
    begin: str
    schema: dict[str, Any]
    end: str


class _StructuralTag(msgspec.Struct, forbid_unknown_fields=True):
    structures: list[_Structure]
    triggers: list[str]
    type: str = "structural_tag"

    def __post_init__(self) -> None:
        if not 0 < len(self.structures) <= 128:
            raise ValueError("there must be 1 to 128 structures")


def _decoded(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
