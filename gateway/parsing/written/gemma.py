"""Gemma's notation: ``{name:<|"|>text<|"|>,other:[1,true]}``, from a schema."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from microserve.gateway.parsing.written.frame import Gemma
from microserve.gateway.parsing.written.lark import NoValue, Rules, Unwritable, quoted
from microserve.gateway.parsing.written.members import ANY_NAME, any_number, in_row, members_of
from microserve.gateway.parsing.written.schema import json_term, of_kind, parts_of, text_term

NOT_IN_NAMES = '\x00":,{}[]<>\n'
COMMA = '"," " "?'
_NOT_OF_ARRAYS = (
    *("prefixItems", "uniqueItems", "contains", "additionalItems", "unevaluatedItems", "enum", "const"),
    *("allOf", "anyOf", "oneOf", "not", "if", "then", "else", "$dynamicRef", "$recursiveRef"),
)


class GemmaWriter:
    """One tool's arguments."""

    def __init__(self, rules: Rules, how: Gemma, root: Mapping[str, Any]) -> None:
        self._rules = rules
        self._quote = how.quote
        self._root = root
        self._made: dict[int, str] = {}
        """Rules of schemas, which live as long as ``root`` does."""
        self._any: str | None = None

    def arguments(self) -> str:
        """Raises :class:`Unwritable`."""
        return self._object(self._root)

    def _object(self, schema: Mapping[str, Any]) -> str:
        members = members_of(schema, self._root)
        if members.named:
            written = []
            for each in members.named:
                if each.name != each.name.strip() or not each.name or set(each.name) & set(NOT_IN_NAMES):
                    raise Unwritable(f"the name {each.name!r}")
                try:
                    value = self._value(each.schema)
                except NoValue:
                    if each.is_required:
                        raise
                    continue
                except Unwritable as error:
                    raise Unwritable(f"{error} (of {each.name!r})") from None
                written.append((self._rules.rule(f"{quoted(each.name + ':')} {value}"), each.is_required))
            if not written:
                return '"{" "}"'
            return f'"{{" ({in_row(self._rules, written, COMMA)}) "}}"'
        if members.others is False:
            return '"{" "}"'
        name = self._rules.terminal(ANY_NAME)
        pair = self._rules.rule(f'{name} ":" {self._value(members.others)}')
        return f'"{{" {any_number(pair, COMMA)} "}}"'

    def _value(self, schema: Any) -> str:
        """A rule's name."""
        if schema is True or schema == {}:
            return self._anything()
        made = self._made.get(id(schema))
        if made is None:  # a schema may have itself in it

            def make(name: str) -> str:
                self._made[id(schema)] = name
                return self._options(schema)

            made = self._rules.recursive(make)
        return made

    def _options(self, schema: Any) -> str:
        parts = parts_of(schema, self._root)
        options = []
        texts: list[dict[str, Any]] = [{}] if {} in parts.texts else parts.texts
        for each in texts:
            body, may_be_empty = text_term(each, self._quote)
            closed = self._rules.closed(body, self._quote, may_be_empty=may_be_empty)
            options.append(f"{self._rules.terms(self._quote)} {closed}")
        plain = [one for kind in ("null", "boolean", "number") for one in of_kind(parts.others, kind)]
        if plain:
            options.append(json_term(plain, self._root))
        options += [self._array(each) for each in of_kind(parts.others, "array")]
        options += [self._object(each) for each in of_kind(parts.others, "object")]
        if not options:
            raise NoValue("a schema without a value")
        return " | ".join(options)

    def _array(self, schema: dict[str, Any]) -> str:
        found = [name for name in _NOT_OF_ARRAYS if name in schema]
        if found:
            raise Unwritable(f"{found[0]} of an array")
        least, most = schema.get("minItems", 0), schema.get("maxItems")
        if most == 0:
            return '"[" "]"'
        item = self._value(schema.get("items", True))
        return f'"[" {any_number(item, COMMA, least, most)} "]"'

    def _anything(self) -> str:
        if self._any is None:

            def make(name: str) -> str:
                self._any = name
                text = f"{self._rules.terms(self._quote)} " + self._rules.closed(
                    text_term({}, self._quote)[0], self._quote, may_be_empty=True
                )
                plain = json_term([{"type": ["null", "boolean", "number"]}], {})
                key = self._rules.terminal(ANY_NAME)
                pairs = any_number(f'{key} ":" {name}', COMMA)
                return f'{text} | {plain} | "[" {any_number(name, COMMA)} "]" | "{{" {pairs} "}}"'

            self._rules.recursive(make)
        assert self._any is not None
        return self._any
