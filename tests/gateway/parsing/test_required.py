"""The grammar of calls that must be made: what it lets through is read as these calls, and no more is."""

from __future__ import annotations

import json
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer
from tokenizers import AddedToken, Tokenizer

from microserve.gateway.parsing.events import Arguments, CallBegun, Said
from microserve.gateway.parsing.families import TOOLS
from microserve.gateway.parsing.parsers import ModelParsers, Wanted
from microserve.gateway.parsing.required import lark_of
from tests.support.gateway.gateway_world import make_tokenizer, special_id

SCHEMAS: dict[str, dict[str, Any]] = {
    "f": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    "g": {"type": "object", "properties": {"t": {"enum": ["</tool_call>", "é"]}}, "required": ["t"]},
}
FRAMED = sorted(name for name, family in TOOLS.items() if family.frame is not None)
SLY = {
    "qwen": ["<function=f>\n</function>\n</tool_call>"],
    "llama": ['{"name": "f", "parameters": {}}', '\n {"name": "f", "parameters": {}}', " [f()]"],
}


def tokenizer_of(family: str) -> Tokenizer:
    """With the family's markers as tokens."""
    tokenizer, tools = make_tokenizer(), TOOLS[family]
    markers = {*tools.opens, *tools.closes, *tools.stray, *tools.inner}
    tokenizer.add_tokens([AddedToken(each, special=False, normalized=False) for each in sorted(markers)])
    return tokenizer


def written(family: str, name: str, arguments: str) -> str:
    frame = TOOLS[family].frame
    assert frame is not None
    return f"{frame.name}{name}{frame.arguments}{arguments}{frame.end}"


@pytest.mark.parametrize("family", FRAMED)
@pytest.mark.parametrize("one_only", [True, False])
@pytest.mark.parametrize("is_free", [True, False])
def test_what_it_lets_through_is_read(family: str, one_only: bool, is_free: bool) -> None:
    frame, tokens = TOOLS[family].frame, tokenizer_of(family)
    assert frame is not None
    parsers = ModelParsers(family, None, tokens.token_to_id)
    wanted = Wanted({name: {} for name in SCHEMAS}, one_only)
    marks = {text: token for text, (token, _) in parsers.marks(wanted).items()}
    lark = lark_of(TOOLS[family], SCHEMAS, marks, one_only=one_only, is_free=is_free)
    grammar = LLMatcher.grammar_from_lark(lark)
    end = special_id(tokens, "<|im_end|>")
    vocabulary = LLTokenizer(tokens.to_str(), eos_token=[end])

    def admits(calls: list[tuple[str, str]], said: str = "") -> bool:
        text = (frame.between or "").join(written(family, *call) for call in calls)
        text = f"{frame.before}{text}{frame.after}" if calls or not is_free else ""
        ids = tokens.encode(said + text).ids
        matcher = LLMatcher(vocabulary, grammar, log_level=0)
        assert not matcher.get_error()
        if matcher.validate_tokens(ids) < len(ids):
            return False
        assert matcher.consume_tokens(ids)
        is_whole = matcher.is_accepting()
        if is_whole:
            expected = [(name, json.loads(arguments)) for name, arguments in calls]
            assert read(ids) == (said.strip(), expected)
        return bool(is_whole)

    def read(ids: list[int]) -> tuple[str, list[tuple[str, Any]]]:
        reader, of_token = parsers.reader(wanted, ""), parsers.mark_of_token(wanted)
        parts = [of_token.get(each) or tokens.decode([each]) for each in ids]
        events = [event for part in parts for event in reader.push(part)]
        events += reader.finish(is_cut=False)
        names = [event.name for event in events if isinstance(event, CallBegun)]
        arguments = [json.loads(event.text) for event in events if isinstance(event, Arguments)]
        text = "".join(event.text for event in events if isinstance(event, Said))
        return text.strip(), list(zip(names, arguments, strict=True))

    assert admits([("f", '{"a": 1}')]) and admits([("f", '{"a":1}')])
    two = [("f", '{"a": 1}'), ("f", '{"a": 2}')]
    assert admits(two) is (not one_only and frame.between is not None)
    for wrong in (("f", '{"a": "x"}'), ("f", "{}"), ("h", '{"a": 1}'), ("f", '{"a":' + " " * 20 + "1}")):
        assert not admits([wrong])
    assert admits([]) is is_free
    assert admits([], "so < it {is}\n") is is_free
    if is_free:  # and nothing else that is read as a call gets by
        for sly in SLY.get(family, []):
            assert not admits([], sly)
    if family != "llama":  # whose calls are the whole of an answer
        assert admits([("f", '{"a": 1}')], "so: ") is is_free
