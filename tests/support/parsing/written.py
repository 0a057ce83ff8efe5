"""Calls as models of each family write them, and grammars of these."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from typing import Any

from llguidance import LLMatcher, LLTokenizer
from tokenizers import AddedToken, Tokenizer

from microserve.gateway.parsing.events import Arguments, CallBegun, Said
from microserve.gateway.parsing.families import HARMONY, TOOLS
from microserve.gateway.parsing.parsers import ModelParsers, Wanted
from microserve.gateway.parsing.required import lark_of
from microserve.gateway.parsing.typed import schemas_of
from microserve.gateway.parsing.typed import typed as read
from microserve.gateway.parsing.written.frame import Gemma, Parameters
from microserve.gateway.parsing.written.gemma import NOT_IN_NAMES
from microserve.gateway.parsing.written.lark import Unwritable
from microserve.gateway.parsing.written.schema import parts_of
from microserve.protocol.grammar.compiled import json_of
from tests.support.gateway.gateway_world import make_tokenizer, special_id
from tests.support.parsing.schemas import DEFS

TYPED = ("\ue000", "\ue001")
_PLAIN = make_tokenizer()
Calls = Sequence[tuple[str, dict[str, Any]]]
THOUGHTS = {"kimi_xtml": "kimi_xtml", "gpt_oss": "gpt_oss", "gemma": "gemma", "mistral": "mistral"}


def tokenizer_of(family: str, *, with_markers: bool = True) -> Tokenizer:
    """With the family's markers as tokens, as far as models have them."""
    tokenizer, tools = make_tokenizer(), TOOLS[family]
    markers = {*tools.opens, *tools.closes, *tools.stray, *tools.inner}
    if family == "gpt_oss":
        markers = {*HARMONY.opens, HARMONY.close, *HARMONY.ends, *HARMONY.inner}
    elif family == "deepseek_dsml":
        markers = {*tools.inner}
    elif family == "kimi_xtml":
        markers = {*tools.inner, "<|end_of_msg|>"}
    if with_markers:
        added = [AddedToken(each, special=False, normalized=False) for each in sorted(markers)]
        tokenizer.add_tokens(added)
    return tokenizer


def typed(value: Any) -> Any:
    """Each text in it as one that a user might have typed."""
    if isinstance(value, str):
        return f"{TYPED[0]}{value}{TYPED[1]}"
    if isinstance(value, list):
        return list(map(typed, value))
    return {name: typed(each) for name, each in value.items()} if isinstance(value, dict) else value


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _text_or_json(value: Any) -> str:
    return value if isinstance(value, str) else _json(value)


def _kind(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else "boolean"
    return {int: "number", float: "number", str: "string", list: "array", dict: "object"}[type(value)]


def _gemma(value: Any) -> str:
    if isinstance(value, str):
        return f'<|"|>{value}<|"|>'
    if isinstance(value, list):
        return f"[{','.join(map(_gemma, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{name}:{_gemma(each)}" for name, each in value.items()) + "}"
    return _json(value)


def _glm(calls: Calls, newline: str) -> str:
    return newline.join(
        f"<tool_call>{name}{newline}"
        + "".join(
            f"<arg_key>{key}</arg_key>{newline}<arg_value>{_text_or_json(value)}</arg_value>{newline}"
            for key, value in arguments.items()
        )
        + "</tool_call>"
        for name, arguments in calls
    )


def _dsml(calls: Calls, around: str, blank: str) -> str:
    mark = f"｜DSML｜{blank}"
    return (
        f"\n\n<｜DSML｜{around}>\n"
        + "".join(
            f'<{mark}invoke name="{name}">\n'
            + "".join(
                f'<{mark}parameter name="{key}" string="{_json(isinstance(value, str))}">'
                f"{_text_or_json(value)}</{mark}parameter>\n"
                for key, value in arguments.items()
            )
            + f"</{mark}invoke>\n"
            for name, arguments in calls
        )
        + f"</｜DSML｜{around}>"
    )


def _xtml(calls: Calls, before: str) -> str:
    return (
        f"{before}<|close|>response<|sep|><|open|>tools<|sep|>"
        + "".join(
            f'<|open|>call tool="{name}" index="{at}"<|sep|>'
            + "".join(
                f'<|open|>argument key="{escape(key)}" type="{_kind(value)}"<|sep|>{_text_or_json(value)}'
                "<|close|>argument<|sep|>"
                for key, value in arguments.items()
            )
            + "<|close|>call<|sep|>"
            for at, (name, arguments) in enumerate(calls, 1)
        )
        + "<|close|>tools<|sep|><|close|>message<|sep|>"
    )


def _kimi(calls: Calls) -> str:
    return (
        "<|tool_calls_section_begin|>"
        + "".join(
            f"<|tool_call_begin|>functions.{name}:{at}<|tool_call_argument_begin|>{_json(arguments)}"
            "<|tool_call_end|>"
            for at, (name, arguments) in enumerate(calls)
        )
        + "<|tool_calls_section_end|>"
    )


WRITTEN: Mapping[str, Callable[[Calls], str]] = {
    "glm": lambda calls: _glm(calls, "\n"),
    "glm 4.7": lambda calls: _glm(calls, ""),
    "deepseek_dsml": lambda calls: _dsml(calls, "function_calls", ""),
    "deepseek_dsml 4": lambda calls: _dsml(calls, "tool_calls", ""),
    "deepseek_dsml 4.1": lambda calls: _dsml(calls, " calls", " "),
    "kimi_xtml": lambda calls: _xtml(calls, ""),
    "kimi_xtml thought": lambda calls: _xtml(calls, "<|open|>response<|sep|>"),
    "gemma": lambda calls: "".join(
        f"<|tool_call>call:{name}{_gemma(arguments)}<tool_call|>" for name, arguments in calls
    ),
    "kimi": _kimi,
    "llama": lambda calls: "; ".join(
        _json({"name": name, "parameters": arguments}) for name, arguments in calls
    ),
    "qwen": lambda calls: "\n".join(
        f"<tool_call>\n{_json({'name': name, 'arguments': arguments})}\n</tool_call>"
        for name, arguments in calls
    ),
    "mistral": lambda calls: "".join(
        f"[TOOL_CALLS]{name}[ARGS]{_json(arguments)}" for name, arguments in calls
    ),
    "deepseek": lambda calls: (
        "<｜tool▁calls▁begin｜>"
        + "".join(
            f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{_json(arguments)}<｜tool▁call▁end｜>"
            for name, arguments in calls
        )
        + "<｜tool▁calls▁end｜>"
    ),
    "gpt_oss": lambda calls: (
        f"<|channel|>analysis<|message|>hm<|end|><|start|>assistant to=functions.{calls[0][0]}"
        f"<|channel|>commentary <|constrain|>json<|message|>{_json(calls[0][1])}"
    ),
    "gpt_oss channel": lambda calls: (
        f"<|channel|>commentary to=functions.{calls[0][0]} <|constrain|>json<|message|>{_json(calls[0][1])}"
    ),
}
"""By family and, behind a blank, what else tells writings of it apart."""
ONE_ONLY = ("gpt_oss",)
"""Families of one call for each answer."""


@dataclass
class World:
    """One family's parsers over a small vocabulary, and a grammar of calls of these tools."""

    family: str
    schemas: Mapping[str, dict[str, Any]]
    one_only: bool = False
    is_free: bool = False
    with_markers: bool = True
    answer: Mapping[str, Any] | None = None
    """Schema of the text, where nothing is called."""
    tokens: Tokenizer = field(init=False)
    vocabulary: LLTokenizer = field(init=False)

    def __post_init__(self) -> None:
        self.tokens, self.vocabulary = _vocabulary(self.family, self.with_markers)
        self.parsers = ModelParsers(self.family, THOUGHTS.get(self.family), self._token_id)
        types = {name: schemas_of(each) for name, each in self.schemas.items()}
        self.wanted = Wanted(types, self.one_only, is_json=self.answer is not None)
        self.marks = {text: token for text, (token, _) in self.parsers.marks(self.wanted).items()}

    def _token_id(self, text: str) -> int | None:
        return self.tokens.token_to_id(text)

    @cached_property
    def lark(self) -> str:
        """Raises ``Unwritable``."""
        return lark_of(
            TOOLS[self.family],
            self.schemas,
            self.marks,
            one_only=self.one_only,
            is_free=self.is_free,
            answer="" if self.answer is None else json_of(self.answer),
        )

    @property
    def is_writable(self) -> bool:
        try:
            return bool(self.lark)
        except Unwritable:
            return False

    @cached_property
    def ends(self) -> frozenset[int]:
        """Tokens that end a value, or a part of a call."""
        return frozenset({*self.marks.values(), *self.ids('"}]<>/1,:')})

    def may_write(self, arguments: Mapping[str, Any]) -> bool:
        """Is there one way only to read these?"""
        frame = TOOLS[self.family].frame
        assert frame is not None
        match frame.parameters:
            case None:
                return not _has(arguments, _is_escaped)
            case Gemma(quote):
                bad = set(NOT_IN_NAMES)
                return not _has(arguments, lambda text: quote in text) and not _has_name(arguments, bad)
            case Parameters() as how:
                for name, value in arguments.items():
                    if isinstance(value, str):
                        if how.banned in value:
                            return False
                        schema = self.wanted.types["f"][name]
                        if not how.is_told and (read(value, schema) != value or parts_are_mixed(schema)):
                            return False
                    elif _has(value, _is_escaped):
                        return False
        return True

    def matcher(self) -> LLMatcher:
        matcher = LLMatcher(self.vocabulary, LLMatcher.grammar_from_lark(self.lark), log_level=0)
        assert not matcher.get_error(), (matcher.get_error(), self.lark)
        return matcher

    def admits(self, text: str) -> bool:
        """Is it one of the grammar, as a whole?"""
        ids, matcher = self.ids(text), self.matcher()
        if matcher.validate_tokens(ids) < len(ids):
            return False
        assert matcher.consume_tokens(ids)
        return bool(matcher.is_accepting())

    def ids(self, text: str) -> list[int]:
        """A marker in a text that is ``typed`` is text."""
        parts = re.split(f"[{''.join(TYPED)}]", text)
        found = [(_PLAIN if at % 2 else self.tokens).encode(part).ids for at, part in enumerate(parts)]
        return [each for ids in found for each in ids]

    def read(self, ids: Sequence[int]) -> tuple[str, list[tuple[str, Any]]]:
        """The text, and the calls."""
        prompt = "<|start|>assistant" if self.family == "gpt_oss" else ""
        marked = self.parsers.mark_of_token(self.wanted)
        prompt = "".join(marked.get(each) or self.tokens.decode([each]) for each in self.ids(prompt))
        reader = self.parsers.reader(self.wanted, prompt)
        events, run = [], list[int]()
        for each in [*ids, -1]:
            if each >= 0 and each not in marked:
                run.append(each)
                continue
            if run:
                events += reader.push(self.tokens.decode(run, skip_special_tokens=False))
                run.clear()
            if each >= 0:
                events += reader.push(marked[each])
        events += reader.finish(is_cut=False)
        names = [event.name for event in events if isinstance(event, CallBegun)]
        arguments = [json.loads(event.text) for event in events if isinstance(event, Arguments)]
        text = "".join(event.text for event in events if isinstance(event, Said) and event.kind == "content")
        return text.strip(), list(zip(names, arguments, strict=True))


def parts_are_mixed(schema: Any) -> bool:
    """May it be a text or a list, map or value that looks like one?"""
    parts = parts_of(schema, {"$defs": DEFS})
    return bool(parts.texts) and bool(parts.others)


def _is_escaped(text: str) -> bool:
    """JSON writes it with escapes, which grammars leave out where they can."""
    return any(ord(each) < 0x20 or each in '"\\\x7f' for each in text)


def _has(value: Any, is_it: Callable[[str], bool]) -> bool:
    """Is there such a text in it?"""
    if isinstance(value, str):
        return is_it(value)
    if isinstance(value, Mapping):
        return any(_has(each, is_it) for each in value.values())
    return isinstance(value, list) and any(_has(each, is_it) for each in value)


def _has_name(value: Any, bad: set[str]) -> bool:
    if isinstance(value, Mapping):
        return any(bad & set(name) or _has_name(each, bad) for name, each in value.items())
    return isinstance(value, list) and any(_has_name(each, bad) for each in value)


_KNOWN: dict[tuple[str, bool], tuple[Tokenizer, LLTokenizer]] = {}


def _vocabulary(family: str, with_markers: bool) -> tuple[Tokenizer, LLTokenizer]:
    key = (family, with_markers)
    if key not in _KNOWN:
        tokens = tokenizer_of(family, with_markers=with_markers)
        end = special_id(tokens, "<|im_end|>")
        _KNOWN[key] = tokens, LLTokenizer(tokens.to_str(), eos_token=[end])
    return _KNOWN[key]
