"""Calls that must be made, with arguments of their tools' schemas -> the grammar of an answer that is these.

Owns how a family's frame becomes Lark: markers that are tokens of their own are these tokens, and no text.
Pure; whether a schema can be enforced is asked elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from microserve.gateway.parsing.families import Frame
from microserve.protocol.grammar.compiled import WHITESPACE

MAX_CALLS = 16
"""Of one answer: it must come to an end."""
_OPTIONS = {
    "item_separator": ",",
    "key_separator": ":",
    "whitespace_flexible": True,
    "whitespace_pattern": WHITESPACE,
}


def lark_of(
    frame: Frame, schemas: Mapping[str, dict[str, Any]], marks: Mapping[str, int], *, one_only: bool
) -> str:
    """``schemas``: of the arguments, by the tool's name; ``marks``: ids of markers that are tokens."""
    rules = []
    for at, (name, schema) in enumerate(schemas.items()):
        parts = [
            *_terms(f"{frame.name}{name}{frame.arguments}", marks),
            f"%json {json.dumps({**schema, 'x-guidance': _OPTIONS})}",
            *_terms(frame.end, marks),
        ]
        rules.append(f"call_{at}: {' '.join(parts)}")
    start = [*_terms(frame.before, marks), "call"]
    if not one_only and frame.between is not None:
        start.append(f"({' '.join([*_terms(frame.between, marks), 'call'])}){{0,{MAX_CALLS - 1}}}")
    start += _terms(frame.after, marks)
    any_call = " | ".join(f"call_{at}" for at in range(len(schemas)))
    return "\n".join([f"start: {' '.join(start)}", f"call: {any_call}", *rules])


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
