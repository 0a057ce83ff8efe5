"""Every field that says what an answer may be becomes a grammar, or is refused by its name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from microserve.gateway.api.parse import parse
from microserve.gateway.openai.grammar import asked_of
from microserve.gateway.openai.schema import CompletionRequest
from microserve.protocol.errors import InvalidRequest
from microserve.protocol.grammar.compiled import WHITESPACE
from microserve.protocol.messages.request.sampling import Grammar

SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": "string"}}}
TEXT = json.dumps(SCHEMA, separators=(",", ":"))
TAGS = {
    "structures": [{"begin": "<f=a>", "schema": SCHEMA, "end": "</f>"}],
    "triggers": ["<f"],
}
TAG = {"type": "structural_tag", **TAGS}
STRUCTURE = {"begin": "<f=a>", "end": "</f>"}
LARGE = {"enum": list(range(1001))}


def request(**fields: Any) -> CompletionRequest:
    return parse(json.dumps({"model": "m", "prompt": "x", **fields}).encode(), CompletionRequest)


def json_schema(**fields: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, **fields}}


@pytest.mark.parametrize(
    ("fields", "grammar", "is_strict"),
    [
        ({"response_format": {"type": "json_object"}}, Grammar(kind="json_object"), False),
        ({"response_format": json_schema()}, Grammar(kind="json_schema", text=TEXT), False),
        ({"response_format": json_schema(strict=True)}, Grammar(kind="json_schema", text=TEXT), True),
        ({"structured_outputs": {"json": SCHEMA}}, Grammar(kind="json_schema", text=TEXT), False),
        ({"structured_outputs": {"json": TEXT}}, Grammar(kind="json_schema", text=TEXT), False),
        ({"structured_outputs": {"json_object": True}}, Grammar(kind="json_object"), False),
        ({"structured_outputs": {"regex": "a+"}}, Grammar(kind="regex", text="a+"), False),
        ({"structured_outputs": {"choice": ["a", "b"]}}, Grammar(kind="choice", text='["a","b"]'), False),
        ({"structured_outputs": {"grammar": "start: /a/"}}, Grammar(kind="lark", text="start: /a/"), False),
        ({"guided_json": SCHEMA}, Grammar(kind="json_schema", text=TEXT), False),
        ({"guided_json": TEXT}, Grammar(kind="json_schema", text=TEXT), False),
        ({"guided_regex": "a+"}, Grammar(kind="regex", text="a+"), False),
        ({"guided_choice": ["a"]}, Grammar(kind="choice", text='["a"]'), False),
        ({"guided_grammar": "start: /a/"}, Grammar(kind="lark", text="start: /a/"), False),
    ],
)
def test_a_field_becomes_a_grammar(fields: dict[str, Any], grammar: Grammar, is_strict: bool) -> None:
    asked = asked_of(request(**fields))
    assert asked is not None
    assert (asked.grammar, asked.is_strict) == (grammar, is_strict)
    assert asked.field.partition(".")[0] == next(iter(fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "structural_tag", **TAGS}},
        {"structured_outputs": {"structural_tag": json.dumps({"type": "structural_tag", **TAGS})}},
    ],
)
def test_structural_tags_become_lark(fields: dict[str, Any]) -> None:
    asked = asked_of(request(**fields))
    assert asked is not None and asked.grammar.kind == "lark" and "%json" in asked.grammar.text
    assert WHITESPACE.replace("\\", "\\\\") in asked.grammar.text, "blanks are bounded here, too"


@pytest.mark.parametrize("fields", [{}, {"response_format": {"type": "text"}}, {"guided_json": None}])
def test_nothing_is_asked(fields: dict[str, Any]) -> None:
    assert asked_of(request(**fields)) is None


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"response_format": {"type": "yaml"}}, "json_schema"),
        ({"response_format": {"type": "json_schema"}}, "missing"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "exclude"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "exclude"),
        ({"structured_outputs": {}}, "asks for nothing"),
        ({"structured_outputs": {"structural_tag": {"format": {}}}}, "structural_tag"),
        ({"response_format": {"type": "structural_tag", **TAGS, "triggers": ["<g"]}}, "no trigger"),
        ({"response_format": {**TAG, "structures": [{**STRUCTURE, "schema": LARGE}]}}, "1000 properties"),
        ({"guided_json": "[1]"}, "must be an object"),
        ({"guided_json": "{"}, "must be an object"),
        ({"guided_regex": ""}, "empty"),
    ],
)
def test_what_cannot_be_honoured_is_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidRequest, match=says) as refused:
        asked_of(request(**fields))
    assert refused.value.field is not None
    assert refused.value.field.partition(".")[0] in fields
