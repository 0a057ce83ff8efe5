"""The grammar of calls that must be made: what it lets through is read as these calls, and no more is."""

from __future__ import annotations

import json
from typing import Any

import pytest

from microserve.gateway.parsing.families import TOOLS
from tests.support.parsing.written import ONE_ONLY, TYPED, WRITTEN, World, typed

SCHEMAS: dict[str, dict[str, Any]] = {
    "f": {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "required": ["a"],
        "additionalProperties": False,
    },
    "g": {"type": "object", "properties": {"t": {"enum": ["</tool_call>", "é"]}}, "required": ["t"]},
}
SLY = {
    "qwen": ["<function=f>\n</function>\n</tool_call>"],
    "llama": ['{"name": "f", "parameters": {}}', '\n {"name": "f", "parameters": {}}', " [f()]"],
}
ONE = {"a": 1}


@pytest.mark.parametrize("style", WRITTEN)
@pytest.mark.parametrize("one_only", [True, False])
@pytest.mark.parametrize("is_free", [True, False])
@pytest.mark.parametrize("with_markers", [True, False])
def test_what_it_lets_through_is_read(style: str, one_only: bool, is_free: bool, with_markers: bool) -> None:
    family = style.split(maxsplit=1)[0]
    world = World(family, SCHEMAS, one_only, is_free, with_markers)
    written = WRITTEN[style]

    def admits(*calls: tuple[str, dict[str, Any]], said: str = "") -> bool:
        text = said + written([(name, typed(each)) for name, each in calls]) if calls else said
        is_one = world.admits(text)
        if is_one:
            assert world.read(world.ids(text)) == (said.strip(), list(calls))
        return is_one

    assert admits(("f", ONE)) and admits(("g", {"t": "</tool_call>"})) and admits(("g", {"t": "é"}))
    may_be_two = not one_only and family not in ONE_ONLY
    assert family in ONE_ONLY or admits(("f", ONE), ("g", {"t": "é"})) is may_be_two
    for wrong in (("f", {"a": "x"}), ("f", {}), ("h", ONE), ("g", {"t": "e"}), ("f", {"a": 1, "b": 1})):
        assert not admits(wrong)
    assert TOOLS[family].frame is not None
    if family in ("gpt_oss", "kimi_xtml"):  # whose answers are framed, too
        return
    assert admits() is is_free
    assert admits(said="so < it {is}\n") is is_free
    if is_free:  # and nothing else that is read as a call gets by
        for sly in SLY.get(family, []):
            assert not admits(said=sly)
    if family != "llama":  # whose calls are the whole of an answer
        assert admits(("f", ONE), said="so: ") is is_free


ANSWER = {
    "type": "object",
    "properties": {"said": {"type": "string"}},
    "required": ["said"],
    "additionalProperties": False,
}
FRAMES = {"kimi_xtml": "<|open|>response<|sep|>", "gpt_oss": "<|channel|>final<|message|>"}
"""Before an answer that is no call."""


@pytest.mark.parametrize("style", [each for each in WRITTEN if not TOOLS[each.split()[0]].bare])
@pytest.mark.parametrize("with_markers", [True, False])
def test_an_answer_is_json_or_calls(style: str, with_markers: bool) -> None:
    """A marker in a string of it is a part of the string, typed or not."""
    family = style.split(maxsplit=1)[0]
    world = World(family, SCHEMAS, is_free=True, with_markers=with_markers, answer=ANSWER)
    frame = FRAMES.get(family, "")
    tools = TOOLS[family]
    for said in ("so", "é", *(typed(each) for each in tools.opens), *tools.opens, *tools.closes):
        text = json.dumps({"said": said}, ensure_ascii=False)
        plain = text.translate(dict.fromkeys(map(ord, TYPED)))
        if world.admits(f"{frame}{text}"):
            assert world.read(world.ids(f"{frame}{text}")) == (plain, [])
        else:  # a token that is special to a template is no text
            assert said not in ("so", "é")
    assert world.admits(f'{frame}{{"said": "so"}}')
    written = WRITTEN[style]([("f", typed(ONE))])
    assert world.admits(written)
    assert world.read(world.ids(written)) == ("", [("f", ONE)])
    assert not world.admits(f"{frame}so")
    assert not world.admits(f'{frame}{{"said": 1}}')
    assert not world.admits(f'{frame}{{"said": "so"}}{written}')
