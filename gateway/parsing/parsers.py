"""The parsers of one model: which family it is of, and a reader for each answer that needs one.

Owns the settings' names, the finding of a family in a chat template, and the markers that are tokens of the
vocabulary: each comes in as one character that no text has, so typed text is never a marker.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Any

from microserve.gateway.parsing.families import (
    ANCHORS,
    THOUGHTS,
    TOOLS,
    Messages,
    Thoughts,
    ToolFamily,
    thoughts_of,
    tool_family_of,
)
from microserve.gateway.parsing.reader import AnswerReader, layout_of
from microserve.gateway.parsing.regions import Layout
from microserve.gateway.parsing.typed import Types
from microserve.protocol.errors import ConfigError

MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
"""Code points that are no characters."""
NO_MARKS = {ord(mark): "\N{REPLACEMENT CHARACTER}" for mark in MARKS}


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to be read in an answer."""

    types: Mapping[str, Types] = field(default_factory=dict)
    """Of the tools that may be called; without any, calls are text."""
    one_only: bool = False
    is_json: bool = False
    """The text, where it is no call, is JSON: a marker in a string of it is a part of the string."""


class ModelParsers:
    """Of one model, for as long as the process lives."""

    def __init__(
        self, tools: str | None, thoughts: str | None, token_id: Callable[[str], int | None]
    ) -> None:
        """``token_id``: of a text that is one token; None for others."""
        self.tools: ToolFamily | None = TOOLS[tools] if tools else None
        self.thoughts: Thoughts | Messages | None = THOUGHTS[thoughts] if thoughts else None
        self.tool_name, self.thought_name = tools, thoughts
        self._token_id = token_id
        self._layouts: dict[bool, Layout] = {}

    @classmethod
    def of_model(
        cls,
        template: str,
        tool_parser: str,
        reasoning_parser: str,
        token_id: Callable[[str], int | None],
    ) -> ModelParsers:
        """``auto``: as the chat template shows. Raises :class:`ConfigError` for a name that is none."""
        tools = _named("tool_parser", tool_parser, tool_family_of(template), TOOLS)
        thoughts = _named("reasoning_parser", reasoning_parser, thoughts_of(template), THOUGHTS)
        return cls(tools, thoughts, token_id)

    def marks(self, wanted: Wanted) -> dict[str, tuple[int, str]]:
        """Markers that are tokens: their ids, and the characters that they come in as."""
        return self._marks[bool(wanted.types)]

    @cached_property
    def _marks(self) -> dict[bool, dict[str, tuple[int, str]]]:
        texts: list[tuple[str, ...]] = [ANCHOR_TOKENS, CHANNELS]
        if isinstance(self.thoughts, Messages):
            texts += [self.thoughts.opens, (self.thoughts.close,), self.thoughts.ends, self.thoughts.inner]
        elif self.thoughts is not None:
            texts += [self.thoughts.opens, self.thoughts.closes]
        tools = self.tools
        of_tools = [] if tools is None else [tools.opens, tools.closes, tools.stray, tools.inner]
        return {False: self._found(texts), True: self._found([*texts, *of_tools])}

    def _found(self, texts: Sequence[tuple[str, ...]]) -> dict[str, tuple[int, str]]:
        free = iter(MARKS)
        found: dict[str, tuple[int, str]] = {}
        for text in dict.fromkeys(chain(*texts)):
            if (token := self._token_id(text)) is not None and (mark := next(free, None)):
                found[text] = (token, mark)
        return found

    def mark_of_token(self, wanted: Wanted) -> dict[int, str]:
        return dict(self.marks(wanted).values())

    def reader(self, wanted: Wanted, prompt: str) -> AnswerReader:
        """A reader for one answer behind ``prompt``, whose end is enough, with marks in it."""
        tools = self.tools if wanted.types else None
        marks = self.marks(wanted)

        def marked(literal: str) -> str:
            for text, (_, mark) in marks.items():
                literal = literal.replace(text, mark)
            return literal

        key = tools is not None
        if key not in self._layouts:
            self._layouts[key] = layout_of(tools, self.thoughts, marked)
        return AnswerReader(
            self._layouts[key],
            self._beginning(prompt, marked),
            tools=tools,
            thoughts=self.thoughts,
            marks={mark: text for text, (_, mark) in marks.items()},
            types=wanted.types,
            one_only=wanted.one_only,
            is_json=wanted.is_json,
        )

    def answer_begins(self, reader: AnswerReader) -> str:
        """What a model writes between its thoughts and its answer; empty where no thought has begun."""
        if isinstance(self.thoughts, Messages):
            return self.thoughts.final
        if self.thoughts is None or reader.kind != "reasoning":
            return ""
        return self.thoughts.closes[0]

    def _beginning(self, prompt: str, marked: Callable[[str], str]) -> str:
        """What the template has written of the answer itself."""
        if isinstance(self.thoughts, Messages):
            begin = prompt.rfind(marked(self.thoughts.opens[0]))
            return prompt[begin:] if begin >= 0 else ""
        ends = (at + len(anchor) for anchor in map(marked, ANCHORS) if (at := prompt.rfind(anchor)) >= 0)
        begin = max(ends, default=len(prompt))
        return prompt[begin:]


ANCHOR_TOKENS = tuple(
    dict.fromkeys(
        (
            *("<|im_start|>", "<|im_assistant|>", "<|im_middle|>", "<|end_header_id|>", "<|header_end|>"),
            *("[/INST]", "<｜Assistant｜>", "<|assistant|>", "<|turn>", "<|end|>", "<|return|>"),
        )
    )
)
CHANNELS = ("<|channel>", "<channel|>")


def signs_of(template: str, shipped: object) -> str:
    """What a family is known by: the chat template, and the ``response_template`` of a model that has one, as
    text. Its markers are the family's; it is not run (docs/decisions.md)."""
    if not isinstance(shipped, dict | list):
        return template
    return f"{template}\n{json.dumps(shipped, ensure_ascii=False).replace(chr(92), '')}"


def _named(setting: str, name: str, found: str | None, known: Mapping[str, Any]) -> str | None:
    if name == "auto":
        return found
    if name == "none":
        return None
    if name not in known:
        names = ", ".join(("auto", "none", *known))
        raise ConfigError(f"model.{setting} must be one of {names}, is {name!r}", field=f"model.{setting}")
    return name
