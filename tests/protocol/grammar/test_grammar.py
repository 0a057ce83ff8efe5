"""What a grammar may be, and that what llguidance cannot enforce is refused and never ignored."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from microserve.protocol.errors import InvalidRequest
from microserve.protocol.grammar.bounds import MAX_SCHEMA_ITEMS, check_bounds, pointer, schemas_in
from microserve.protocol.grammar.compiled import compile_grammar, load_tokenizer
from microserve.protocol.messages.request.sampling import MAX_GRAMMAR_NBYTES, Grammar, SamplingParams
from tests.support.gateway.gateway_world import make_tokenizer, special_id


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    make_tokenizer().save(str(directory / "tokenizer.json"))
    return directory


LARK_CHAIN = "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(5000)) + 'r5000: "a"\n'
"""Ends a process by its stack, if it gets that far."""


def nested(depth: int) -> Any:
    schema: Any = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    ("kind", "text", "says"),
    [
        ("json_schema", json.dumps({"enum": ["x" * 70_000]}), "65536 bytes"),
        (
            "json_schema",
            json.dumps({"enum": [str(i) for i in range(MAX_SCHEMA_ITEMS + 1)]}),
            "1000 properties",
        ),
        ("json_schema", json.dumps({"properties": {f"k{i}": {} for i in range(3000)}}), "1000 properties"),
        ("json_schema", json.dumps(nested(900)), "64 deep"),
        ("json_schema", "[" * 60_000, "JSON|deep"),
        ("json_schema", "true", "an object"),
        ("json_schema", '{"a": ', "not JSON"),
        ("choice", "[]", "there must be choices"),
        ("choice", '["a", 1]', "a list of strings"),
        ("choice", json.dumps([str(i) for i in range(2000)]), "1000 choices"),
        ("regex", "a?" * 5000, "4096 characters"),
        ("lark", LARK_CHAIN, "1000 lines"),
        ("lark", 'start: "' + "a" * 20_000 + '"', "characters"),
    ],
)
def test_what_is_too_much_is_refused_before_a_library_sees_it(kind: str, text: str, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says) as refused:
        check_bounds(Grammar(kind=kind, text=text))
    assert refused.value.field == "grammar"


@pytest.mark.parametrize(
    ("grammar", "says"),
    [
        (Grammar(kind="xml", text="x"), "must be one of"),
        (Grammar(kind="regex"), "needs a text"),
        (Grammar(kind="json_object", text="x"), "needs no text"),
        (Grammar(kind="lark", text="x" * (MAX_GRAMMAR_NBYTES + 1)), "bytes at most"),
        (Grammar(kind="lark", text="日" * (MAX_GRAMMAR_NBYTES // 2)), "bytes at most"),
        (Grammar(kind="json_object", after_token_ids=(500,)), "below 500"),
        (Grammar(kind="json_object", after_token_ids=(1,) * 17), "16 tokens"),
    ],
)
def test_what_cannot_be_one_on_the_wire_is_refused(grammar: Grammar, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        SamplingParams(grammar=grammar).validate(500)


@pytest.mark.parametrize(
    ("kind", "text", "says"),
    [
        ("json_schema", '{"type":"array","uniqueItems":true}', "uniqueItems"),
        ("json_schema", '{"if":{},"then":{}}', "if"),
        ("json_schema", '{"not":{}}', "not"),
        ("json_schema", '{"enum":[]}', "Unsatisfiable"),
        ("json_schema", '{"type":"objec"}', "objec"),
        ("json_schema", '{"type":"string","pattern":"(a"}', "unclosed"),
        ("json_schema", '{"x-guidance":{"lenient":true},"not":{}}', "not"),
        ("regex", "(a", "unclosed"),
        ("lark", "start: foo", "foo"),
        ("lark", "start: " + "(" * 2000 + '"a"' + ")" * 2000, "nested"),
    ],
)
def test_what_cannot_be_enforced_is_refused_by_name(model: Path, kind: str, text: str, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        compile_grammar(load_tokenizer(model), Grammar(kind=kind, text=text))


@pytest.mark.parametrize(
    ("grammar", "good", "bad"),
    [
        (Grammar(kind="json_object"), '{"a": [1, "é日本😀"]}', "[1]"),
        (Grammar(kind="json_object"), '{"a":1}', '{"a":         1}'),
        (Grammar(kind="choice", text='["a/b\\"", "日本"]'), "日本", "日x"),
        (Grammar(kind="choice", text='["a/b\\"", "日本"]'), 'a/b"', "a/c"),
        (Grammar(kind="regex", text="a/b\\d+"), "a/b12", "a/bx"),
        (Grammar(kind="lark", text='start: "x"+'), "xx", "xy"),
        (Grammar(kind="json_schema", text='{"type":"string","pattern":"^\\\\d$"}'), '"1"', '"\u0663"'),
        (Grammar(kind="json_schema", text='{"type":"string","pattern":"^\\\\W$"}'), '"\u00e9"', '"e"'),
        (Grammar(kind="regex", text="\\d"), "\u0663", "x"),
        (
            Grammar(kind="json_schema", text='{"oneOf":[{"type":"string"},{"type":"integer"}]}'),
            "12",
            "true",
        ),
    ],
)
def test_a_matcher_takes_what_is_in_the_grammar_and_nothing_else(
    model: Path, grammar: Grammar, good: str, bad: str
) -> None:
    tokenizer = load_tokenizer(model)
    for text, is_in in ((good, True), (bad, False)):
        matcher = compile_grammar(tokenizer, grammar)
        tokens = tokenizer.tokenize_str(text)
        assert (matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()) == is_in, text


def test_control_tokens_are_never_legal_inside_a_string(model: Path) -> None:
    tokenizer = load_tokenizer(model)
    matcher = compile_grammar(tokenizer, Grammar(kind="json_schema", text='{"type":"string"}'))
    assert matcher.consume_token(tokenizer.tokenize_str('"')[0])
    mask = int.from_bytes(matcher.compute_bitmask(), "little")
    specials = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    assert not any(mask >> special_id(make_tokenizer(), each) & 1 for each in specials)


@pytest.mark.slow
def test_a_thousand_optional_properties_are_served(model: Path) -> None:
    schema = {"type": "object", "properties": {f"k{i}": {"type": "string"} for i in range(MAX_SCHEMA_ITEMS)}}
    compile_grammar(load_tokenizer(model), Grammar(kind="json_schema", text=json.dumps(schema)))


def test_names_of_properties_are_no_keywords() -> None:
    schema = {"properties": {"not": {"enum": [{"if": 1}]}, "a/b": {"items": {"not": {}}}}}
    assert [pointer(path) for path, each in schemas_in(schema) if "not" in each] == [
        "#/properties/a~1b/items"
    ]


HEAVY = "\n".join(
    [
        f"start: ({' | '.join(f'W{i}' for i in range(14))})+",
        *(f"W{i}: /[a-z ]*{chr(97 + i)}[a-z ]{{0,{i}}}[{chr(97 + i)}-z]/" for i in range(14)),
    ]
)


@pytest.mark.slow
def test_a_mask_that_would_take_long_is_no_grammar(tmp_path: Path) -> None:
    """Each token of everybody would wait for it: 0.1 s, of a vocabulary of 40,000."""
    state = json.loads(make_tokenizer().to_str())
    draw = random.Random(1)
    words = {
        "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(3, 12))) for _ in range(40_000)
    }
    state["model"]["vocab"] |= {word: 1000 + at for at, word in enumerate(sorted(words))}
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    large = load_tokenizer(tmp_path)
    with pytest.raises(InvalidRequest, match="too many"):
        compile_grammar(large, Grammar(kind="lark", text=HEAVY))
    optional = {f"property_{i}": {"type": "string"} for i in range(MAX_SCHEMA_ITEMS)}
    schema = {"type": "object", "properties": optional, "additionalProperties": False}
    compile_grammar(large, Grammar(kind="json_schema", text=json.dumps(schema)))
