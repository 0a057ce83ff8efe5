"""Arguments one behind the other, each with its name: a text as it is, any other value in JSON."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext, suppress
from html import escape
from typing import Any

from microserve.gateway.parsing.typed import is_text, resolved, typed
from microserve.gateway.parsing.written.frame import Parameters, Text
from microserve.gateway.parsing.written.lark import NoValue, Rules, Unwritable
from microserve.gateway.parsing.written.members import ANY_NAME, Member, any_number, in_row, members_of
from microserve.gateway.parsing.written.schema import (
    Parts,
    is_any,
    json_term,
    kinds_in,
    of_kind,
    parts_of,
    text_term,
)

MAX_OTHERS = 32
"""Arguments of a tool that names none."""
_PLAIN = ("null", "boolean", "integer", "number")
_UNLIKE_JSON = "/[^\\x00-\\x20\\x7f-\\xa0\\u1680\\u2000-\\u200f\\u2028-\\u202f\\u205f\\u3000\\ufeff"
_UNLIKE_JSON += "0-9\\[\\]{}()\"'+.tfnTFN\\-](?s:.*)/"
"""What no reader takes for a number, a word of JSON or Python, a list, a map or white space before one."""


def parameters_term(rules: Rules, how: Parameters, schema: Mapping[str, Any]) -> str:
    """Terms of all arguments. Raises :class:`Unwritable`."""
    members = members_of(schema, schema)
    if members.named:
        written = list[tuple[str, bool]]()
        for member in members.named:
            with suppress(NoValue) if not member.is_required else nullcontext():
                written.append((_parameter(rules, how, member, schema), member.is_required))
        return in_row(rules, written)
    if members.others is False:
        return ""
    each = _written(rules, how, rules.terminal(ANY_NAME), "", members.others, schema)
    return any_number(rules.rule(each), most=MAX_OTHERS)


def _parameter(rules: Rules, how: Parameters, member: Member, root: Mapping[str, Any]) -> str:
    name = escape(member.name) if how.is_escaped else member.name
    if not name or name != name.strip() or any(each in name for each in how.not_in_names):
        raise Unwritable(f"the name {member.name!r}")
    try:
        return rules.rule(_written(rules, how, "", name, member.schema, root))
    except NoValue:
        raise
    except Unwritable as error:
        raise Unwritable(f"{error} (of {member.name!r})") from None


def _written(
    rules: Rules, how: Parameters, name_term: str, name: str, schema: Any, root: Mapping[str, Any]
) -> str:
    """``name_term``: of a name that is not known; then ``name`` is empty."""
    parts = parts_of(schema, root)
    texts = _texts(parts, how, schema, root)
    gap = rules.terms(how.gap)

    def begun(behind: Text) -> str:
        if name_term:
            return f"{rules.terms(how.key)} {name_term} {rules.terms(behind)}"
        keys = (how.key,) if isinstance(how.key, str) else how.key
        ways = (behind,) if isinstance(behind, str) else behind
        return rules.terms(tuple(f"{key}{name}{way}" for key in keys for way in ways))

    options = []
    for body, may_be_empty in texts:
        closed = rules.closed(body, how.end, may_be_empty=may_be_empty)
        options.append(f"{begun(how.text)} {closed} {gap}".rstrip())
    if parts.others and "{kind}" not in str(how.json):
        value = json_term(parts.others, root)
        options.append(f"{begun(how.json)} {value} {rules.terms(how.end)} {gap}".rstrip())
    elif parts.others:
        kinds = kinds_in(parts.others)
        kinds = [each for each in kinds if each != "integer"] + ["number"] * ("integer" in kinds)
        for kind in dict.fromkeys(kinds):
            found = of_kind(parts.others, kind)
            if not found:
                continue
            value = json_term(found, root)
            behind = tuple(each.format(kind=kind) for each in _each(how.json))
            options.append(f"{begun(behind)} {value} {rules.terms(how.end)} {gap}".rstrip())
    if not options:
        raise NoValue("a schema without a value")
    return options[0] if len(options) == 1 else " | ".join(options)


def _each(text: Text) -> tuple[str, ...]:
    return (text,) if isinstance(text, str) else text


def _texts(parts: Parts, how: Parameters, schema: Any, root: Mapping[str, Any]) -> list[tuple[str, bool]]:
    """Terminals' bodies of what is written as it is, and whether each may be empty."""
    texts = [{}] if {} in parts.texts else parts.texts
    if how.is_told or not texts:
        return [text_term(each, how.banned) for each in texts]
    known = resolved(schema, root)
    are_plain = is_text(known) and all(is_any(each, _PLAIN) for each in parts.others)
    found = []
    for each in texts:
        if parts.others and not are_plain and "enum" not in each and "const" not in each:
            body, _ = text_term(each, how.banned)
            found.append((f"{body} & {_UNLIKE_JSON}", False))
            continue
        for text in each.get("enum", [each.get("const")]):
            if isinstance(text, str) and parts.others and not are_plain and typed(text, known) != text:
                raise Unwritable(f"the text {text!r} beside values that are none")
        found.append(text_term(each, how.banned))
    return found
