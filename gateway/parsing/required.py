"""Calls that must be made, or must match their tools' schemas -> the grammar of an answer with these.

Owns how a family's frame becomes Lark: markers that are tokens of their own are these tokens, and no text.
Pure; whether a schema can be enforced is asked elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from microserve.gateway.parsing.families import Messages, ToolFamily
from microserve.gateway.parsing.written.frame import Frame, Gemma, Text
from microserve.gateway.parsing.written.gemma import GemmaWriter
from microserve.gateway.parsing.written.lark import SOME, Rules, Unwritable, without
from microserve.gateway.parsing.written.parameters import parameters_term
from microserve.protocol.grammar.compiled import json_of

MAX_CALLS = 16
"""Of one answer: it must come to an end."""
MAX_MESSAGES = 4
"""Before a call, where answers are messages."""
NUMBER = "/[0-9]{1,4}/"


def lark_of(
    tools: ToolFamily,
    schemas: Mapping[str, dict[str, Any]],
    marks: Mapping[str, int],
    *,
    one_only: bool,
    is_free: bool = False,
    answer: str = "",
) -> str:
    """``schemas``: of the arguments, by the tool's name; ``marks``: ids of markers that are tokens.
    ``is_free``: there may be text as well, and no call at all; but what begins as a call is one.
    ``answer``: a term that all of the text must be then, and it comes in the place of calls, not beside them.

    Raises :class:`Unwritable`, which says of which tool, for a schema that calls of this family cannot keep.
    """
    rules = Rules(marks)
    frame = tools.frame
    assert frame is not None and not (answer and is_free and tools.bare)
    arguments = {name: _arguments(rules, frame, name, schema) for name, schema in schemas.items()}
    if tools.messages is not None:
        start = _messages(rules, tools.messages, arguments, is_free=is_free, answer=answer)
    elif is_free and answer:
        tail = f"({rules.terms(frame.tail)} |)" if frame.tail else ""
        start = f"{rules.terms(frame.lead)} {answer} {tail} | {_framed(rules, frame, arguments, one_only)}"
    elif not is_free:
        start = _framed(rules, frame, arguments, one_only)
    elif tools.bare:
        text = rules.terminal(rf"/\s+|\s*[^\s{re.escape(tools.bare)}](?s:.*)/")
        start = f"{text} | {_framed(rules, frame, arguments, one_only)} |"
    else:
        start = _beside_text(rules, tools, frame, arguments, one_only)
    return "\n".join([f"start: {start}", *rules.lines])


def _arguments(rules: Rules, frame: Frame, name: str, schema: dict[str, Any]) -> str:
    try:
        if frame.parameters is None:
            return json_of(schema)
        if isinstance(frame.parameters, Gemma):
            return GemmaWriter(rules, frame.parameters, schema).arguments()
        return parameters_term(rules, frame.parameters, schema)
    except Unwritable as error:
        error.tool = name
        raise


def _framed(rules: Rules, frame: Frame, arguments: Mapping[str, str], one_only: bool) -> str:
    """Around calls all that comes before and after."""
    calls = _calls(rules, frame, arguments, one_only)
    around = (frame.lead, frame.tail, frame.before)
    return " ".join([*map(rules.terms, around), calls, rules.terms(frame.after)])


def _calls(
    rules: Rules, frame: Frame, arguments: Mapping[str, str], one_only: bool, *, begun: int = 0
) -> str:
    """``begun``: characters of the first call that are there."""
    call = _call(rules, frame, arguments)
    first = _call(rules, frame, arguments, begun) if begun else call
    if one_only or frame.between is None:
        return first
    return f"{first} ({rules.terms(frame.between)} {call}){{0,{MAX_CALLS - 1}}}"


def _call(rules: Rules, frame: Frame, arguments: Mapping[str, str], begun: int = 0) -> str:
    options = []
    for name, written in arguments.items():
        names = tuple(f"{each[begun:]}{name}" for each in _each(frame.name))
        if frame.numbered:
            names = tuple(f"{each}{frame.numbered}" for each in names)
            head = f"{rules.terms(names)} {rules.terminal(NUMBER)} {rules.terms(frame.arguments)}"
        else:
            head = rules.terms(tuple(f"{each}{way}" for each in names for way in _each(frame.arguments)))
        options.append(rules.rule(f"{head} {written} {rules.terms(frame.end)}"))
    return rules.rule(" | ".join(options))


def _beside_text(
    rules: Rules, tools: ToolFamily, frame: Frame, arguments: Mapping[str, str], one_only: bool
) -> str:
    """Text has nothing in it that begins a call. One terminal with what begins one, up to its first token."""
    framed = tuple(f"{each}{name}" for each in _each(frame.before) for name in _each(frame.name))
    begins = {*tools.opens, *(one for one in tools.opens + tools.stray if framed[0].lstrip().startswith(one))}
    around = [each for each in (*_each(frame.lead), *_each(frame.tail)) if each]
    text = without(*sorted(begins), *around)
    some = rules.terminal(f"({text}) & {SOME}")
    if frame.tail:
        calls = _calls(rules, frame, arguments, one_only)
        ends = f"{rules.terms(frame.before)} {calls} {rules.terms(frame.after)}"
        closed = rules.closed(text, frame.tail, may_be_empty=True)
        return f"{rules.terms(frame.lead)} ({closed} ({ends} |) | {some} |)"
    if any(_each(frame.before)):
        opened = rules.closed(text, frame.before, may_be_empty=True)
        calls = _calls(rules, frame, arguments, one_only)
    else:
        assert isinstance(frame.name, str)
        begun, _ = rules.parts(frame.name)[0]
        opened = rules.closed(text, begun, may_be_empty=True)
        calls = _calls(rules, frame, arguments, one_only, begun=len(begun))
    unit = rules.rule(f"{opened} {calls} {rules.terms(frame.after)}")
    if not tools.closes:
        return f"{unit} | {some} |"
    return f"{unit}{{0,{1 if one_only else MAX_CALLS}}} ({some} |)"


def _messages(
    rules: Rules, how: Messages, arguments: Mapping[str, str], *, is_free: bool, answer: str
) -> str:
    """Thoughts and what is told before a call, then the call: or, where that is free, the answer."""
    channel, begin = how.opens[1], how.close
    markers = (*how.opens, how.close, *how.ends, *how.inner)
    text = without(*markers)
    said = rules.closed(text, f"{how.ends[0]}{how.opens[0]}assistant", may_be_empty=True)
    before = rules.rule(f"{rules.terms((f'{channel}analysis{begin}', f'{channel}commentary{begin}'))} {said}")
    kinds = (" <|constrain|>json", "<|constrain|>json", " json", "")
    options = []
    for name, written in arguments.items():
        heads = tuple(
            f"{way}{kind}{begin}"
            for way in (
                f"{channel}commentary to=functions.{name}",
                f" to=functions.{name}{channel}commentary",
            )
            for kind in kinds
        )
        options.append(rules.rule(f"{rules.terms(heads)} {written}"))
    if is_free:
        said_last = answer or f"({rules.terminal(f'({text}) & {SOME}')} |)"
        options.append(rules.rule(f"{rules.terms(how.final)} {said_last}"))
    return f"{before}{{0,{MAX_MESSAGES}}} {rules.rule(' | '.join(options))}"


def _each(text: Text) -> tuple[str, ...]:
    return (text,) if isinstance(text, str) else text
