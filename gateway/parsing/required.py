"""Calls that must be made, or must match their tools' schemas -> the grammar of an answer with these.

Owns how a family's frame becomes Lark: markers that are tokens of their own are these tokens, and no text.
Pure; whether a schema can be enforced is asked elsewhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from microserve.gateway.parsing.families import Frame, ToolFamily
from microserve.protocol.grammar.compiled import json_of

MAX_CALLS = 16
"""Of one answer: it must come to an end."""


def lark_of(
    tools: ToolFamily,
    schemas: Mapping[str, dict[str, Any]],
    marks: Mapping[str, int],
    *,
    one_only: bool,
    is_free: bool = False,
) -> str:
    """``schemas``: of the arguments, by the tool's name; ``marks``: ids of markers that are tokens.
    ``is_free``: there may be text as well, and no call at all; but what begins as a call is one."""
    frame = tools.frame
    assert frame is not None
    rules = []
    for at, (name, schema) in enumerate(schemas.items()):
        parts = [
            *_terms(f"{frame.name}{name}{frame.arguments}", marks),
            json_of(schema),
            *_terms(frame.end, marks),
        ]
        rules.append(f"call_{at}: {' '.join(parts)}")
    calls = [*_terms(frame.before, marks), "call"]
    if not one_only and frame.between is not None:
        calls.append(f"({' '.join([*_terms(frame.between, marks), 'call'])}){{0,{MAX_CALLS - 1}}}")
    calls += _terms(frame.after, marks)
    any_call = " | ".join(f"call_{at}" for at in range(len(schemas)))
    start = _beside_text(tools, frame, one_only) if is_free else ["start: calls"]
    return "\n".join([*start, f"calls: {' '.join(calls)}", f"call: {any_call}", *rules])


def _beside_text(tools: ToolFamily, frame: Frame, one_only: bool) -> list[str]:
    """Text has nothing in it that begins a call."""
    if tools.bare:
        return ["start: TEXT | calls |", rf"TEXT: /\s+|\s*[^\s{re.escape(tools.bare)}](?s:.*)/"]
    framed = f"{frame.before}{frame.name}"
    begins = {*tools.opens, next(each for each in tools.opens + tools.stray if framed.startswith(each))}
    any_begin = "|".join(re.escape(each).replace("/", r"\/") for each in sorted(begins))
    more = f"(calls text){{0,{1 if one_only else MAX_CALLS}}}" if tools.closes else "calls?"
    return [
        f"start: text {more}",
        "text: TEXT |",
        f"TEXT: /(?s:.+)/ & ~/(?s:.*)({any_begin})(?s:.*)/",
    ]


def _terms(text: str, marks: Mapping[str, int]) -> list[str]:
    """Texts in quotation marks, and tokens by their ids."""
    terms: list[str] = []
    while text:
        at, mark = min(
            ((at, mark) for mark in marks if (at := text.find(mark)) >= 0), default=(len(text), "")
        )
        if at:
            terms.append(json.dumps(text[:at], ensure_ascii=False))
        if mark:
            terms.append(f"<[{marks[mark]}]>")
        text = text[at + len(mark) :]
    return terms
