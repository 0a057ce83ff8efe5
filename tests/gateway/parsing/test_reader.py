"""What an answer says does not depend on how it was cut; no marker is ever text; nothing raises."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from microserve.gateway.parsing.calls import BROKEN
from microserve.gateway.parsing.events import Arguments, CallBegun, Event, Said
from microserve.gateway.parsing.families import THOUGHTS, TOOLS, Messages, thoughts_of, tool_family_of
from microserve.gateway.parsing.parsers import ModelParsers, Wanted, signs_of
from microserve.gateway.parsing.reader import MAX_CALLS
from microserve.protocol.errors import ConfigError

TYPES = {"f": {"a": {"type": "integer"}}, "g": {}}
FAMILIES = {
    "qwen": "think", "glm": "think", "llama": None, "mistral": "mistral", "deepseek": "think",
    "kimi": "think", "deepseek_dsml": "think", "kimi_xtml": "kimi_xtml", "gemma": "gemma",
    "gpt_oss": "gpt_oss",
}  # fmt: skip
CALLS = {
    "qwen": '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>',
    "glm": "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n</tool_call>",
    "llama": '{"name": "f", "parameters": {"a": 1}}',
    "mistral": '[TOOL_CALLS]f[ARGS]{"a": 1}',
    "deepseek": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>"
    '{"a": 1}<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
    "kimi": '<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{"a": 1}<|tool_call_end|>',
    "deepseek_dsml": '<｜DSML｜function_calls><｜DSML｜invoke name="f">'
    '<｜DSML｜parameter name="a" string="false">1'
    "</｜DSML｜parameter></｜DSML｜invoke></｜DSML｜function_calls>",
    "kimi_xtml": '<|open|>call tool="f" index="1"<|sep|><|open|>argument key="a" type="number"<|sep|>1'
    "<|close|>argument<|sep|><|close|>call<|sep|>",
    "gemma": "<|tool_call>call:f{a:1}<tool_call|>",
    "gpt_oss": '<|start|>assistant to=functions.f<|channel|>commentary json<|message|>{"a": 1}<|call|>',
}  # fmt: skip


def markers_of(family: str) -> list[str]:
    tools, thoughts = TOOLS[family], THOUGHTS.get(FAMILIES[family] or "")
    found = [*tools.opens, *tools.closes, *tools.stray, *tools.inner]
    if isinstance(thoughts, Messages):
        return [*found, *thoughts.opens, thoughts.close, *thoughts.ends]
    return found if thoughts is None else [*found, *thoughts.opens, *thoughts.closes]


def events_of(
    family: str, parts: Sequence[str], *, is_cut: bool = False, one_only: bool = False
) -> list[Event]:
    parsers = ModelParsers(family, FAMILIES[family], lambda text: None)
    reader = parsers.reader(Wanted(TYPES, one_only), "")
    events = [event for part in parts for event in reader.push(part)]
    return [*events, *reader.finish(is_cut=is_cut)]


def joined(events: Sequence[Event]) -> list[tuple[str, str]]:
    """The answer, whatever its pieces; ids are made up."""
    found: list[tuple[str, str]] = []
    for event in events:
        match event:
            case Said(kind, text) if found and found[-1][0] == kind:
                found[-1] = (kind, found[-1][1] + text)
            case Said(kind, text):
                found.append((kind, text))
            case CallBegun(index, _, name):
                found.append((f"call {index}", name))
            case Arguments(index, text):
                found.append((f"arguments {index}", text))
    return found


@st.composite
def answers(draw: st.DrawFn) -> tuple[str, list[str]]:
    family = draw(st.sampled_from(sorted(FAMILIES)))
    pieces = st.sampled_from([*markers_of(family), CALLS[family], '{"name": "f"', "}", '"', "\\", " ", "\n"])
    text = "".join(draw(st.lists(pieces | st.text(max_size=4), max_size=12)))
    borders = sorted(draw(st.lists(st.integers(0, len(text)), max_size=12)))
    return family, [text[begin:end] for begin, end in zip([0, *borders], [*borders, len(text)], strict=True)]


@example(answer=("llama", [" ", "<|python_end|>"]), is_cut=False)
@given(answer=answers(), is_cut=st.booleans())
def test_the_same_for_every_cut(answer: tuple[str, list[str]], is_cut: bool) -> None:
    family, parts = answer
    text = "".join(parts)
    whole = joined(events_of(family, [text], is_cut=is_cut))
    assert joined(events_of(family, parts, is_cut=is_cut)) == whole
    assert joined(events_of(family, list(text), is_cut=is_cut)) == whole
    for kind, said in whole:
        if kind.startswith("arguments"):
            assert isinstance(json.loads(said), dict)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_call_of_each_family(family: str) -> None:
    begun, arguments = events_of(family, [CALLS[family]])
    assert isinstance(begun, CallBegun) and (begun.index, begun.name) == (0, "f")
    assert arguments == Arguments(0, '{"a": 1}')
    assert begun.id == "functions.f:0" if family == "kimi" else begun.id
    assert len(begun.id) == 9 or family != "mistral"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<think>\nhm\n</think>\n\nyes", [("reasoning", "hm"), ("content", "yes")]),
        ("a\n<tool_call>{}</tool_call>", [("content", "a\n{}")]),
        (
            '<tool_call>{"name": "h", "arguments": {}}</tool_call>',
            [("content", '{"name": "h", "arguments": {}}')],
        ),
        ("one </tool_call> two", [("content", "one  two")]),
        ("  kept  ", [("content", "  kept  ")]),
        ('{"name": "f", "arguments": {"a": 1}}', [("content", '{"name": "f", "arguments": {"a": 1}}')]),
    ],
)
def test_what_is_text(text: str, said: list[tuple[str, str]]) -> None:
    """Without its markers; a call of no tool, or of nothing that can be read, is text as well."""
    assert joined(events_of("qwen", [text])) == said


def test_text_around_two_calls() -> None:
    text = f"one {CALLS['qwen']}\n{CALLS['qwen']} two\n"
    assert [name for name, _ in joined(events_of("qwen", [text]))] == [
        "content", "call 0", "arguments 0", "call 1", "arguments 1", "content",
    ]  # fmt: skip
    assert [said for kind, said in joined(events_of("qwen", [text])) if kind == "content"] == [
        "one",
        " \n two",
    ]


def test_one_call_is_enough_where_one_was_asked_for() -> None:
    assert joined(events_of("qwen", [CALLS["qwen"] * 2 + "more"], one_only=True)) == [
        ("call 0", "f"),
        ("arguments 0", '{"a": 1}'),
    ]


def test_a_call_that_is_cut_off_is_no_text() -> None:
    assert joined(events_of("qwen", ["so: ", CALLS["qwen"][:30]], is_cut=True)) == [("content", "so:")]


def test_a_marker_in_a_value_is_text_and_a_typed_one_is_no_marker() -> None:
    """Where markers are tokens, only these are; else a text in quotation marks has none."""
    [_, arguments] = events_of(
        "qwen", ['<tool_call>{"name": "g", "arguments": {"t": "</tool_call>"}}</tool_call>']
    )
    assert arguments == Arguments(0, '{"t": "</tool_call>"}')
    ids = {"<tool_call>": 7, "</tool_call>": 8}
    parsers = ModelParsers("qwen", None, ids.get)
    reader = parsers.reader(Wanted(TYPES), "")
    events = [*reader.push("<tool_call>{}</tool_call>"), *reader.finish(is_cut=False)]
    assert joined(events) == [("content", "<tool_call>{}</tool_call>")]
    marks = parsers.mark_of_token(Wanted(TYPES))
    reader = parsers.reader(Wanted(TYPES), "")
    assert len(reader.push(f'{marks[7]}{{"name": "g", "arguments": {{}}}}{marks[8]}')) == 2


@pytest.mark.parametrize(
    ("prompt", "kind"),
    [
        ("<|im_start|>user\n<think><|im_end|>\n<|im_start|>assistant\n<think>\n", "reasoning"),
        ("<|im_start|>user\n<think><|im_end|>\n<|im_start|>assistant\n", "content"),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", "content"),
        ("<think> of a prompt without a template", "content"),
    ],
)
def test_what_the_template_has_begun(prompt: str, kind: str) -> None:
    reader = ModelParsers("qwen", "think", lambda text: None).reader(Wanted(), prompt)
    assert joined(reader.push("x")) == [(kind, "x")]


@pytest.mark.parametrize("family", ["qwen", "llama", "kimi"])
def test_arguments_are_text_that_can_be_sent(family: str) -> None:
    """A model may write half of a surrogate pair as an escape: that is no character."""
    text = CALLS[family].replace('"a": 1', '"a": "\\ud83d", "b": "\\ud83d\\ude00"')
    [_, arguments] = events_of(family, [text])
    assert isinstance(arguments, Arguments)
    assert json.loads(arguments.text.encode()) == {"a": "\ufffd", "b": "\U0001f600"}


@pytest.mark.parametrize("own", ["x", "y" * 300, "\ud83d", ""])
def test_calls_have_ids_that_differ_and_may_come_back(own: str) -> None:
    text = json.dumps({"name": "f", "id": own, "arguments": {"a": 1}})
    begun = [each for each in events_of("llama", [f"{text};{text}"]) if isinstance(each, CallBegun)]
    first, second = (each.id for each in begun)
    assert first != second and 0 < len(first) <= 256 and first.encode()
    assert (first == own) is (own == "x")


def test_more_calls_than_there_may_be_are_counted() -> None:
    reader = ModelParsers("qwen", None, lambda text: None).reader(Wanted(TYPES), "")
    reader.push(CALLS["qwen"] * (MAX_CALLS + 2))
    assert (reader.num_calls, reader.num_unread) == (MAX_CALLS, 2)


HOSTILE: dict[str, str] = {
    "qwen": "<function=f>" + "<parameter=a>\nx" * 100_000 + "</function>",
    "qwen ": "<function=f>" + "<parameter=" * 100_000 + "</function>",
    "glm": "f" + "<arg_key>" * 100_000,
    "glm ": "f" + "<arg_key>a</arg_key>" * 100_000,
    "glm  ": "f" + "<arg_key>a</arg_key><arg_value></arg_value>" * 50_000 + "x",
    "kimi_xtml": 'tool="f"<|sep|>' + '<|open|>argument key="a" type="string"<|sep|>' * 50_000,
    "deepseek_dsml": '<｜DSML｜invoke name="f">' * 50_000,
    "deepseek_dsml ": '<｜DSML｜invoke name="f">'
    + '<｜DSML｜parameter name="a">' * 50_000
    + "</｜DSML｜invoke>",
    "deepseek_dsml  ": '<｜DSML｜invoke name="f">'
    + '<｜DSML｜parameter name="' * 50_000
    + "</｜DSML｜invoke>",
}
"""By families (blanks tell cases apart): beginnings without ends; each looked for anew, it were minutes."""


@pytest.mark.parametrize("case", HOSTILE)
def test_a_call_is_read_in_a_time_that_grows_with_it(case: str) -> None:
    with suppress(*BROKEN):
        assert all(not call.arguments for call in TOOLS[case.strip()].notation(HOSTILE[case], {}))


GLM_OPEN = "<arg_key>b</arg_key><arg_value>x</tool_call>"


@pytest.mark.parametrize(
    ("family", "text", "arguments"),
    [
        ("qwen", "<function=f><parameter=a>\n1\n\n</parameter><parameter=b>x</function>", {"a": 1, "b": "x"}),
        ("qwen", "<function=f>\n<parameter=a>\n</parameter>\n<parameter=b>\nx</function>", {"a": ""}),
        ("glm", "f<arg_key>a</arg_key>\n<arg_value>1</arg_value>" + GLM_OPEN, {"a": 1, "b": "x"}),
        ("qwen", '\n{"name": "f", "arguments": {"t": "<function=g>"}}', {"t": "<function=g>"}),
        ("deepseek_dsml", '<｜DSML｜invoke name="f"/>', {}),
        ("deepseek_dsml", '<｜DSML｜ invoke name="f">{"a": 1}</｜DSML｜ invoke>', {"a": 1}),
    ],
)  # fmt: skip
def test_how_values_end(family: str, text: str, arguments: dict[str, object]) -> None:
    [call] = TOOLS[family].notation(text, {})
    assert (call.name, call.arguments) == ("f", arguments)


NESTED = {
    "glm": "<tool_call>g<arg_key>o</arg_key><arg_value>%s</arg_value></tool_call>",
    "deepseek_dsml": '<｜DSML｜function_calls><｜DSML｜invoke name="g">'
    '<｜DSML｜parameter name="o" string="false">%s'
    "</｜DSML｜parameter></｜DSML｜invoke></｜DSML｜function_calls>",
    "kimi_xtml": '<|open|>call tool="g" index="1"<|sep|><|open|>argument key="o" type="object"<|sep|>%s'
    "<|close|>argument<|sep|><|close|>call<|sep|>",
}


@pytest.mark.parametrize("family", NESTED)
@pytest.mark.parametrize("cut", [1, 3, 1000])
def test_an_end_in_a_string_of_an_object_is_text(family: str, cut: int) -> None:
    before, after = NESTED[family].split("%s")
    value = {"a": f'"{after}\\', "b": [after, "\\"]}
    text = before + json.dumps(value, ensure_ascii=False) + after
    events = events_of(family, [text[at : at + cut] for at in range(0, len(text), cut)])
    [arguments] = [json.loads(each.text) for each in events if isinstance(each, Arguments)]
    assert arguments == {"o": value}


LONG: dict[str, Callable[[int], str]] = {
    "white space": lambda n: " " * n,
    "beginnings of markers": lambda n: "<" * n,
    "open calls": lambda n: "<tool_call>" * (n // 11),
    "an open string": lambda n: '<tool_call>{"' + "a" * n,
    "markers in a string": lambda n: '<tool_call>{"' + "</tool_call>" * (n // 12),
    "markers in a value": lambda n: "<tool_call><function=f><parameter=a>" + "</tool_call>" * (n // 12),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LONG)
def test_a_long_answer_of_beginnings(name: str) -> None:
    """Each step looks at what is held back and no more; with the whole text each time it were minutes."""
    text = LONG[name](100_000)
    said = [each.text for each in events_of("qwen", list(text)) if isinstance(each, Said)]
    assert name == "open calls" or "".join(said).strip() in text


def test_families_are_known_by_their_templates() -> None:
    assert tool_family_of("{{ '<tool_call>' }}") == "qwen"
    assert tool_family_of("<tool_call> <arg_key>") == "glm"
    assert tool_family_of("{{ tools }}<|start_header_id|>") == "llama"
    assert tool_family_of("plain") is None
    shipped = {"fields": {"tool_calls": {"open_pattern": r"<\|tool_call>call:", "close": "<tool_call|>"}}}
    assert tool_family_of(signs_of("plain", shipped)) == "gemma"
    assert tool_family_of(signs_of("plain", None)) is None
    assert (thoughts_of("</think>"), thoughts_of("plain")) == ("think", None)
    with pytest.raises(ConfigError, match=r"model\.tool_parser"):
        ModelParsers.of_model("", "hermes2", "auto", lambda text: None)
    assert ModelParsers.of_model("</think>", "none", "none", lambda text: None).thoughts is None
