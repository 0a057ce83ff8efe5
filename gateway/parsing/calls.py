"""The text of a call, as families of models write it -> names and arguments.

Owns one function a notation; each raises one of ``BROKEN`` for what is none. Knows nothing of streams or
markers around a call.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from html import unescape
from typing import Any

from microserve.gateway.parsing.typed import (
    MAX_LITERAL_CHARS,
    Types,
    behind_space,
    decoder,
    fail,
    is_text,
    loaded,
    typed,
)


@dataclass(frozen=True, slots=True)
class Call:
    name: str
    arguments: dict[str, Any]
    id: str = ""
    """As the model wrote it, where it does."""


BROKEN = (ValueError, SyntaxError, RecursionError, MemoryError, KeyError, TypeError)
"""What reading a call may raise, whatever the model has written."""
Notation = Callable[[str, Mapping[str, Types]], list[Call]]


def _call(value: Any) -> Call:
    """``{"name": .., "arguments" or "parameters": {..}}``"""
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict) or not isinstance(name := value.get("name"), str):
        raise ValueError("a call has no name")
    arguments = value.get("arguments", value.get("parameters"))
    if isinstance(arguments, str):
        arguments = loaded(arguments)
    if not isinstance(arguments, dict):
        raise ValueError("a call has no arguments")
    call_id = value.get("id")
    return Call(name, arguments, call_id if isinstance(call_id, str) else "")


def in_json(text: str, types: Mapping[str, Types]) -> list[Call]:
    """Objects, or a list of them, with nothing but white space, commas and semicolons between."""
    calls: list[Call] = []
    at = 0
    while True:
        while at < len(text) and (text[at].isspace() or text[at] in ",;"):
            at += 1
        if at == len(text):
            return calls or fail("no call")
        value, at = decoder.raw_decode(text, at)
        calls += map(_call, value) if isinstance(value, list) else [_call(value)]


def in_python(text: str, types: Mapping[str, Types]) -> list[Call]:
    """``[f(a=1), g()]``, or JSON."""
    text = text.removeprefix("<|python_tag|>").removeprefix("<|python_start|>")
    if text.lstrip().startswith("[") and not re.match(r"\s*\[\s*\{", text):
        tree = ast.parse(text.strip()[:MAX_LITERAL_CHARS], mode="eval").body
        if not isinstance(tree, ast.List) or not tree.elts:
            raise ValueError("no list of calls")
        return [_python_call(each) for each in tree.elts]
    return in_json(text, types)


def _python_call(tree: ast.expr) -> Call:
    if not isinstance(tree, ast.Call) or tree.args or any(each.arg is None for each in tree.keywords):
        raise ValueError("no call by keywords")
    return Call(ast.unparse(tree.func), {str(each.arg): _python_value(each.value) for each in tree.keywords})


def _python_value(tree: ast.expr) -> Any:
    constants = {"true": True, "false": False, "null": None}
    match tree:
        case ast.Name(id=name) if name in constants:
            return constants[name]
        case ast.List(elts=items):
            return [_python_value(each) for each in items]
        case ast.Dict(keys=keys, values=values):
            return {
                str(ast.literal_eval(key)) if key else fail("**"): _python_value(value)
                for key, value in zip(keys, values, strict=True)
            }
    return ast.literal_eval(tree)


def named_json(text: str, types: Mapping[str, Types]) -> list[Call]:
    """Mistral: ``f[ARGS]{..}``, ``f[CALL_ID]9[ARGS]{..}``, ``[{..}, ..]``, one behind the other."""
    calls: list[Call] = []
    at = behind_space(text, 0)
    while at < len(text):
        if text.startswith("[TOOL_CALLS]", at):
            at += len("[TOOL_CALLS]")
        elif text[at] in "[{":
            value, at = decoder.raw_decode(text, at)
            calls += map(_call, value) if isinstance(value, list) else [_call(value)]
        else:
            end = text.find("{", at)
            name, _, call_id = text[at : end if end > 0 else len(text)].partition("[CALL_ID]")
            value, at = decoder.raw_decode(text, end) if end > 0 else fail("no arguments")
            name = name.removesuffix("[ARGS]").strip()
            calls.append(_call({"name": name, "arguments": value, "id": call_id.removesuffix("[ARGS]")}))
        at = behind_space(text, at)
    return calls or fail("no call")


def deepseek(text: str, types: Mapping[str, Types]) -> list[Call]:
    """``f<｜tool▁sep｜>{..}``, or ``function<｜tool▁sep｜>f`` and the JSON between fences."""
    name, sep, rest = text.partition("<｜tool▁sep｜>")
    if "```json" in rest:
        name, _, rest = rest.partition("```json")
        rest = rest.rpartition("```")[0]
    return [_call({"name": name.strip(), "arguments": loaded(rest)})] if sep else fail("no separator")


def kimi(text: str, types: Mapping[str, Types]) -> list[Call]:
    """``functions.f:0<|tool_call_argument_begin|>{..}``"""
    call_id, sep, rest = text.partition("<|tool_call_argument_begin|>")
    call_id = call_id.strip()
    name = re.sub(r":\d+$", "", call_id).removeprefix("functions.")
    return [_call({"name": name, "arguments": loaded(rest), "id": call_id})] if sep else fail("no arguments")


_XTML = re.compile(r'\s*<\|open\|>argument key="([^"]*)" type="(\w+)"<\|sep\|>')
_XTML_END = "<|close|>argument<|sep|>"


def kimi_xtml(text: str, types: Mapping[str, Types]) -> list[Call]:
    """``tool="f" index="1"<|sep|>`` and its arguments, each with its type."""
    head = re.match(r'\s*tool="([^"]*)"[^<]*<\|sep\|>', text)
    if head is None:
        raise ValueError("no tool")
    arguments, at = {}, head.end()
    while argument := _XTML.match(text, at):
        if argument[2] == "string":
            end = text.find(_XTML_END, argument.end())
            value = text[argument.end() : end] if end >= 0 else fail("an argument is cut off")
        else:
            value, end = decoder.raw_decode(text, behind_space(text, argument.end()))
            end = behind_space(text, end)
            end = end if text.startswith(_XTML_END, end) else fail("more than a value")
        arguments[unescape(argument[1])] = value
        at = end + len(_XTML_END)
    return [Call(unescape(head[1]), arguments)] if not text[at:].strip() else fail("more than arguments")


_PARAMETER = re.compile(r"<parameter=([^<>\n]+)>(\n?)")
_VALUE_END = re.compile(r"</parameter>|(?=<parameter=|</function>)")
_LINES_END = re.compile(r"(?<=\n)(?:</parameter>|(?=<parameter=|</function>))")
"""A value on lines of its own ends at a line of its own."""
_FUNCTION = re.compile(r"(?:^|(?<=\n)|(?<=>))[ \t]*<function=")


def qwen(text: str, types: Mapping[str, Types]) -> list[Call]:
    """JSON (Hermes), or ``<function=f>`` with a ``<parameter=p>`` for each argument."""
    if "<function=" not in text or text.lstrip().startswith(("{", "[")):
        return in_json(text, types)
    return [_qwen_call(part, types) for part in _FUNCTION.split(text)[1:]] or fail("no call")


def _qwen_call(text: str, types: Mapping[str, Types]) -> Call:
    name, sep, rest = text.partition(">")
    if not sep or "</function>" not in rest:
        raise ValueError("a call is cut off")
    known = types.get(name.strip(), {})
    values = {key.strip(): value for key, value in _parameters(rest)}
    return Call(name.strip(), {key: typed(value, known.get(key)) for key, value in values.items()})


def _parameters(text: str) -> Iterator[tuple[str, str]]:
    """In one pass: an end that is nowhere behind one parameter is nowhere behind the next ones."""
    at, gone = 0, set()
    while begun := _PARAMETER.search(text, at):
        at, on_lines = begun.end(), bool(begun[2])
        if on_lines in gone:
            continue
        end = (_LINES_END if on_lines else _VALUE_END).search(text, at)
        if end is None:
            gone.add(on_lines)
            continue
        value = text[at : end.start()]
        yield begun[1], value.removesuffix("\n") if on_lines else value
        at = end.end()


_KEY = re.compile(r"\s*<arg_key>")
_VALUE = re.compile(r"\s*<arg_value>")
_KEY_END, _VALUE_END_GLM = "</arg_key>", "</arg_value>"


def glm(text: str, types: Mapping[str, Types]) -> list[Call]:
    """``f`` and pairs of ``<arg_key>`` and ``<arg_value>``."""
    name = text.partition("<arg_key>")[0].strip()
    at = text.find(name) + len(name)
    known, arguments = types.get(name, {}), {}
    while key := _KEY.match(text, at):
        end = text.find(_KEY_END, key.end())
        value = _VALUE.match(text, end + len(_KEY_END)) if end >= 0 else None
        if value is None:
            raise ValueError("a key has no value")
        word = text[key.end() : end].strip()
        schema = known.get(word)
        if not is_text(schema) and (found := _json_until(text, value.end(), _VALUE_END_GLM)):
            written, at = found
        elif (end := text.find(_VALUE_END_GLM, value.end())) >= 0:
            written, at = text[value.end() : end], end + len(_VALUE_END_GLM)
        else:
            written, at = text[value.end() :].removesuffix("\n").removesuffix("</tool_call>"), len(text)
        arguments[word] = typed(written, schema)
    if not name or text[at:].strip():
        raise ValueError("no call, or more than its arguments")
    return [Call(name, arguments)]


def glm_is_json(head: str, before: str, types: Mapping[str, Types]) -> bool:
    """Is the value behind ``before`` written in JSON, as the tool that ``head`` names says?"""
    name = head.partition("<arg_key>")[0].strip()
    key = before.rpartition("<arg_key>")[2].partition(_KEY_END)[0].strip()
    return not is_text(types.get(name, {}).get(key))


def _json_until(text: str, at: int, end: str) -> tuple[str, int] | None:
    """A list, object or string in JSON that ``end`` follows, and where that ends: a string may have an
    ``end`` in it."""
    begin = behind_space(text, at)
    if begin == len(text) or text[begin] not in '[{"':
        return None
    try:
        _, behind = decoder.raw_decode(text, begin)
    except (ValueError, RecursionError):
        return None
    behind = behind_space(text, behind)
    return (text[at:behind], behind + len(end)) if text.startswith(end, behind) else None


_INVOKE = re.compile(r'\s*<｜DSML｜ ?invoke name="([^"<]*)"\s*(/?)>')
_INVOKE_END = r"(?P<invoke></｜DSML｜ ?invoke>)"
_DSML_PART = re.compile(
    r'<｜DSML｜ ?parameter name="(?P<name>[^"<]*)"(?: string="(?P<string>true|false)")?[^<>]*>|' + _INVOKE_END
)
_DSML_END = re.compile(r"</｜DSML｜ ?parameter>")
_DSML_VALUE_END = re.compile(r"\s*</｜DSML｜ ?(?:parameter|(?P<invoke>invoke))>")


def dsml(text: str, types: Mapping[str, Types]) -> list[Call]:
    """DeepSeek from V3.2 on: ``<｜DSML｜invoke name="f">`` with parameters that say whether they are text."""
    return list(_dsml_calls(text)) or fail("no call")


def _dsml_calls(text: str) -> Iterator[Call]:
    at = 0
    while begun := _INVOKE.match(text, at):
        at, found = begun.end(), dict[str, Any]()
        begin = behind_space(text, at)
        if not begun[2] and text.startswith("{", begin):
            found, at = decoder.raw_decode(text, begin)
            end = _DSML_VALUE_END.match(text, at)
            at = end.end() if end and end["invoke"] else fail("more than arguments")
        elif not begun[2]:
            at = _dsml_arguments(text, at, found)
        yield Call(begun[1], found)
    if text[at:].strip():
        raise ValueError("more than calls")


def _dsml_arguments(text: str, at: int, found: dict[str, Any]) -> int:
    """Into ``found``; where the call ends."""
    while part := _DSML_PART.search(text, at) or fail("a call is cut off"):
        at = part.end()
        if part["invoke"]:
            return at
        if part["string"] == "false":
            value, at = decoder.raw_decode(text, behind_space(text, at))
            end = _DSML_VALUE_END.match(text, at)
            at = end.end() if end and not end["invoke"] else fail("more than a value")
        else:
            ended = _DSML_END.search(text, at) or fail("a value is cut off")
            value, at = text[at : ended.start()], ended.end()
        found[part["name"]] = value
    return at


_QUOTE = '<|"|>'
_GEMMA_KEY = re.compile(r'([{,])([^\x00":,{}\[\]]+):')


def gemma(text: str, types: Mapping[str, Types]) -> list[Call]:
    """``call:f{key:<|"|>text<|"|>,other:[1,true]}``"""
    head = re.match(r"\s*call:([^{]+?)\s*(?=\{)", text)
    if head is None:
        raise ValueError("no call")
    parts = text[head.end() :].split(_QUOTE)
    if len(parts) % 2 == 0:
        raise ValueError("a text is cut off")
    texts = parts[1::2]
    outline = "\x00".join(parts[::2])  # a text may have any of the marks of the notation
    outline = _GEMMA_KEY.sub(lambda found: f"{found[1]}{json.dumps(found[2].strip())}:", outline)
    rest = iter(texts)
    value = re.sub("\x00", lambda _: json.dumps(next(rest)), outline)
    return [_call({"name": head[1].strip(), "arguments": loaded(value)})]


def harmony(name: str, text: str) -> list[Call]:
    """A message to a function, which its header names."""
    return [_call({"name": name, "arguments": loaded(text)})]
