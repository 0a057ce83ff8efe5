"""The text of a call, as families of models write it -> names and arguments.

Owns one function a notation; each raises one of ``BROKEN`` for what is none. Knows nothing of streams or
markers around a call.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from html import unescape
from typing import Any

MAX_LITERAL_CHARS = 1 << 16
"""Of a value in Python's notation; beyond it is text."""
_decoder = json.JSONDecoder(parse_constant=lambda name: _fail(f"{name} is no JSON"))
Types = Mapping[str, Mapping[str, Any]]
"""The schema of each parameter, by tool and name."""


@dataclass(frozen=True, slots=True)
class Call:
    name: str
    arguments: dict[str, Any]
    id: str = ""
    """As the model wrote it, where it does."""


BROKEN = (ValueError, SyntaxError, RecursionError, MemoryError, KeyError, TypeError)
"""What reading a call may raise, whatever the model has written."""
Notation = Callable[[str, Mapping[str, Types]], list[Call]]


def _fail(why: str) -> Any:
    raise ValueError(why)


def _call(value: Any) -> Call:
    """``{"name": .., "arguments" or "parameters": {..}}``"""
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict) or not isinstance(name := value.get("name"), str):
        raise ValueError("a call has no name")
    arguments = value.get("arguments", value.get("parameters"))
    if isinstance(arguments, str):
        arguments = _loaded(arguments)
    if not isinstance(arguments, dict):
        raise ValueError("a call has no arguments")
    call_id = value.get("id")
    return Call(name, arguments, call_id if isinstance(call_id, str) else "")


def _loaded(text: str) -> Any:
    value, end = _decoder.raw_decode(text, _behind_space(text, 0))
    return value if _behind_space(text, end) == len(text) else _fail("more than one value")


def _behind_space(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def in_json(text: str, types: Mapping[str, Types]) -> list[Call]:
    """Objects, or a list of them, with nothing but white space, commas and semicolons between."""
    calls: list[Call] = []
    at = 0
    while True:
        while at < len(text) and (text[at].isspace() or text[at] in ",;"):
            at += 1
        if at == len(text):
            return calls or _fail("no call")
        value, at = _decoder.raw_decode(text, at)
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
                str(ast.literal_eval(key)) if key else _fail("**"): _python_value(value)
                for key, value in zip(keys, values, strict=True)
            }
    return ast.literal_eval(tree)


def named_json(text: str, types: Mapping[str, Types]) -> list[Call]:
    """Mistral: ``f[ARGS]{..}``, ``f[CALL_ID]9[ARGS]{..}``, ``[{..}, ..]``, one behind the other."""
    calls: list[Call] = []
    at = _behind_space(text, 0)
    while at < len(text):
        if text.startswith("[TOOL_CALLS]", at):
            at += len("[TOOL_CALLS]")
        elif text[at] in "[{":
            value, at = _decoder.raw_decode(text, at)
            calls += map(_call, value) if isinstance(value, list) else [_call(value)]
        else:
            end = text.find("{", at)
            name, _, call_id = text[at : end if end > 0 else len(text)].partition("[CALL_ID]")
            value, at = _decoder.raw_decode(text, end) if end > 0 else _fail("no arguments")
            name = name.removesuffix("[ARGS]").strip()
            calls.append(_call({"name": name, "arguments": value, "id": call_id.removesuffix("[ARGS]")}))
        at = _behind_space(text, at)
    return calls or _fail("no call")


def deepseek(text: str, types: Mapping[str, Types]) -> list[Call]:
    """``f<｜tool▁sep｜>{..}``, or ``function<｜tool▁sep｜>f`` and the JSON between fences."""
    name, sep, rest = text.partition("<｜tool▁sep｜>")
    if "```json" in rest:
        name, _, rest = rest.partition("```json")
        rest = rest.rpartition("```")[0]
    return [_call({"name": name.strip(), "arguments": _loaded(rest)})] if sep else _fail("no separator")


def kimi(text: str, types: Mapping[str, Types]) -> list[Call]:
    """``functions.f:0<|tool_call_argument_begin|>{..}``"""
    call_id, sep, rest = text.partition("<|tool_call_argument_begin|>")
    call_id = call_id.strip()
    name = re.sub(r":\d+$", "", call_id).removeprefix("functions.")
    return (
        [_call({"name": name, "arguments": _loaded(rest), "id": call_id})] if sep else _fail("no arguments")
    )


_XTML = re.compile(r'\s*<\|open\|>argument key="([^"]*)" type="(\w+)"<\|sep\|>')
_XTML_END = "<|close|>argument<|sep|>"


def kimi_xtml(text: str, types: Mapping[str, Types]) -> list[Call]:
    """``tool="f" index="1"<|sep|>`` and its arguments, each with its type."""
    head = re.match(r'\s*tool="([^"]*)"[^<]*<\|sep\|>', text)
    if head is None:
        raise ValueError("no tool")
    arguments, at = {}, head.end()
    while argument := _XTML.match(text, at):
        end = text.find(_XTML_END, argument.end())
        value = text[argument.end() : end] if end >= 0 else _fail("an argument is cut off")
        arguments[unescape(argument[1])] = value if argument[2] == "string" else _loaded(value)
        at = end + len(_XTML_END)
    return [Call(unescape(head[1]), arguments)] if not text[at:].strip() else _fail("more than arguments")


_PARAMETER = re.compile(r"<parameter=([^<>\n]+)>(\n?)")
_VALUE_END = re.compile(r"</parameter>|(?=<parameter=|</function>)")
_LINES_END = re.compile(r"(?<=\n)(?:</parameter>|(?=<parameter=|</function>))")
"""A value on lines of its own ends at a line of its own."""
_FUNCTION = re.compile(r"(?:^|(?<=\n)|(?<=>))[ \t]*<function=")


def qwen(text: str, types: Mapping[str, Types]) -> list[Call]:
    """JSON (Hermes), or ``<function=f>`` with a ``<parameter=p>`` for each argument."""
    if "<function=" not in text:
        return in_json(text, types)
    return [_qwen_call(part, types) for part in _FUNCTION.split(text)[1:]] or _fail("no call")


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


def glm(text: str, types: Mapping[str, Types]) -> list[Call]:
    """``f`` and pairs of ``<arg_key>`` and ``<arg_value>``."""
    name = text.partition("<arg_key>")[0].strip()
    at = text.find(name) + len(name)
    known, arguments = types.get(name, {}), {}
    while key := _KEY.match(text, at):
        end = text.find("</arg_key>", key.end())
        value = _VALUE.match(text, end + len("</arg_key>")) if end >= 0 else None
        if value is None:
            raise ValueError("a key has no value")
        word = text[key.end() : end].strip()
        end = text.find("</arg_value>", value.end())
        if end >= 0:
            written, at = text[value.end() : end], end + len("</arg_value>")
        else:
            written, at = text[value.end() :].removesuffix("\n").removesuffix("</tool_call>"), len(text)
        arguments[word] = typed(written, known.get(word))
    if not name or text[at:].strip():
        raise ValueError("no call, or more than its arguments")
    return [Call(name, arguments)]


_INVOKE = re.compile(r'\s*<｜DSML｜ ?invoke name="([^"<]*)"\s*(/?)>')
_INVOKE_END = re.compile(r"</｜DSML｜ ?invoke>")
_DSML = re.compile(r'<｜DSML｜ ?parameter name="([^"<]*)"(?: string="(true|false)")?[^<>]*>')
_DSML_END = re.compile(r"</｜DSML｜ ?parameter>")


def dsml(text: str, types: Mapping[str, Types]) -> list[Call]:
    """DeepSeek from V3.2 on: ``<｜DSML｜invoke name="f">`` with parameters that say whether they are text."""
    return list(_dsml_calls(text)) or _fail("no call")


def _dsml_calls(text: str) -> Iterator[Call]:
    at = 0
    while begun := _INVOKE.match(text, at):
        at, body = begun.end(), ""
        if not begun[2]:
            end = _INVOKE_END.search(text, at) or _fail("a call is cut off")
            body, at = text[at : end.start()], end.end()
        found = _loaded(body) if body.lstrip().startswith("{") else dict(_dsml_arguments(body))
        yield Call(begun[1], found)
    if text[at:].strip():
        raise ValueError("more than calls")


def _dsml_arguments(text: str) -> Iterator[tuple[str, Any]]:
    at = 0
    while begun := _DSML.search(text, at):
        end = _DSML_END.search(text, begun.end())
        if end is None:
            return
        value, at = text[begun.end() : end.start()], end.end()
        yield begun[1], _loaded(value) if begun[2] == "false" else value


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
    return [_call({"name": head[1].strip(), "arguments": _loaded(value)})]


def schemas_of(parameters: Mapping[str, Any] | None) -> Types:
    properties = (parameters or {}).get("properties")
    return properties if isinstance(properties, dict) else {}


def typed(text: str, schema: Any) -> Any:
    """A value that is written without its type, as the tool's schema says; what fits no type is text."""
    kinds = _kinds(schema)
    if not kinds:
        try:
            return _loaded(text)
        except (ValueError, RecursionError):
            return text
    word = text.strip()
    if "null" in kinds and word in ("null", "None"):
        return None
    if "boolean" in kinds and word.lower() in ("true", "false"):
        return word.lower() == "true"
    wanted = {"integer": int, "number": (int, float), "object": dict, "array": list}
    found = list[Any]()
    for read in (_loaded, _literal):  # once, of however many kinds a client's schema is
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            found.append(read(word))
    for kind in dict.fromkeys(kinds):
        if kind in wanted:
            for each in found:
                is_whole = kind == "integer" and isinstance(each, float) and each.is_integer()
                value = int(each) if is_whole else each
                if isinstance(value, wanted[kind]) and not isinstance(value, bool):  # type: ignore[arg-type]
                    return value
    return text


def _literal(text: str) -> Any:
    return ast.literal_eval(text) if len(text) <= MAX_LITERAL_CHARS else _fail("too long")


def _kinds(schema: Any) -> list[str]:
    if not isinstance(schema, dict):
        return []
    kind = schema.get("type")
    found = [kind] if isinstance(kind, str) else [each for each in kind or [] if isinstance(each, str)]
    for name in ("anyOf", "oneOf"):
        for each in schema.get(name) or []:
            found += _kinds(each)
    if not found and isinstance(schema.get("enum"), list):
        found = ["string"] if all(isinstance(each, str) for each in schema["enum"]) else []
    return found


def harmony(name: str, text: str) -> list[Call]:
    """A message to a function, which its header names."""
    return [_call({"name": name, "arguments": _loaded(text)})]
