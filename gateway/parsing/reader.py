"""One answer as it grows: text in, what it says out, the same for every cut of the text.

Owns what a client sees of it: white space around thoughts and calls is none of the text, calls have ids and
names of tools that there are, and what cannot be read as a call is text, without its markers, and counted.
"""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from microserve.gateway.parsing.calls import BROKEN, Call, harmony
from microserve.gateway.parsing.events import Arguments, CallBegun, Event, Kind, Said
from microserve.gateway.parsing.families import Messages, Thoughts, ToolFamily
from microserve.gateway.parsing.openness import Openness, Strings
from microserve.gateway.parsing.regions import SINK, Layout, Regions
from microserve.gateway.parsing.typed import Types

_ALPHABET = string.ascii_letters + string.digits
MAX_CALLS = 256
"""Of one answer; more are counted as what cannot be read."""
MAX_ID_CHARS = 256
_SURROGATE = re.compile("[\ud800-\udfff]")
STREAMED = frozenset((SINK, "reasoning"))


def layout_of(
    tools: ToolFamily | None, thoughts: Thoughts | Messages | None, mark: Callable[[str], str]
) -> Layout:
    """Of a family; ``mark``: literals as they come in."""
    regions: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {}
    stray: tuple[str, ...] = ()
    if isinstance(thoughts, Thoughts):
        regions["reasoning"] = (thoughts.opens, thoughts.closes)
        stray += thoughts.closes
    if isinstance(thoughts, Messages):
        regions["header"] = (thoughts.opens, (thoughts.close,))
        stray += thoughts.ends
    elif tools is not None:
        regions["call"] = (tools.opens, tools.closes)
        stray += tools.stray
    marked = {name: (map(mark, opens), map(mark, closes)) for name, (opens, closes) in regions.items()}
    return Layout.of(marked, map(mark, stray))


@dataclass(slots=True)
class Spoken:
    """Text of one kind, without the white space at its borders."""

    begun: bool
    """Something of it is out, or white space before it is its own."""
    space: list[str] = field(default_factory=list)
    """That may be the end."""

    def push(self, text: str) -> str:
        """What of it is certain."""
        if not self.begun:
            text = text.lstrip()
        body = text.rstrip()
        if not body:
            if self.begun and text:
                self.space.append(text)
            return ""
        self.begun = True
        out = "".join([*self.space, body])
        self.space = [text[len(body) :]] if len(text) > len(body) else []
        return out

    def close(self) -> None:
        """Something else follows: the white space between is nobody's."""
        self.begun = False
        self.space.clear()


class AnswerReader:
    """``push`` text, ``finish`` at its end; both tell what is new."""

    def __init__(
        self,
        layout: Layout,
        prefix: str,
        *,
        tools: ToolFamily | None,
        thoughts: Thoughts | Messages | None,
        marks: Mapping[str, str],
        types: Mapping[str, Types],
        one_only: bool = False,
        is_json: bool = False,
    ) -> None:
        """``prefix``: what a template has written of the answer. ``marks``: each marker that comes
        as one character, by it. ``types``: of the tools that may be called. ``is_json``: of the text."""
        self.num_unread = 0
        """Calls that could not be read."""
        self.num_calls = 0
        self.enough = False
        """There is the one call that was asked for; nothing more is of interest."""
        self._tools = tools
        self._is_harmony = isinstance(thoughts, Messages)
        self._marks = {ord(mark): text for mark, text in marks.items()}
        self._no_marks: dict[int, str] = dict.fromkeys(self._marks, "")
        self._json = Strings() if is_json else None
        self._types = types
        self._one_only = one_only
        self._content, self._thought = Spoken(True), Spoken(False)
        self._has_content = self._has_regions = self._is_cut = False
        self._message = SINK
        """What the message at hand is, where there are messages: content, reasoning, a tool or nothing."""
        self._bare: list[str] | None = [] if tools is not None and tools.bare else None
        self._lead = ""  # white space before the character that decides
        """The answer so far, while it may be calls as a whole."""
        self._body: list[str] = []
        """Of a message that is a call."""
        self._ids: set[str] = set()
        self._opener = ""
        self._value: Openness | None = None
        """Of the call at hand, once it has begun."""
        self._regions = Regions(
            layout,
            is_open=self._is_open,
            on_text=self._on_text,
            on_begin=self._on_begin,
            on_end=self._on_end,
            streamed=STREAMED,
        )
        self._events: list[Event] = []
        self._regions.push(prefix)
        self._events.clear()  # what a template has written is no part of the answer
        self._content.space.clear()
        self._thought.space.clear()

    @property
    def kind(self) -> str:
        """Of what comes next: ``content``, ``reasoning``, or a call or marker."""
        region = self._regions.region
        return self._message if self._is_harmony and region == SINK else region

    def push(self, text: str) -> list[Event]:
        if not self.enough:
            self._regions.push(text)
        return self._taken()

    def finish(self, *, is_cut: bool) -> list[Event]:
        """``is_cut``: by a bound of tokens, not by the model: half a call is not even text."""
        if not self.enough:
            self._is_cut = is_cut
            self._regions.finish()
            self._end_message()
            bare, self._bare = self._bare, None
            if bare:
                self._read("".join(bare), is_whole=True)
            if self._content.begun and not self._has_regions:
                self._show("content", "".join(self._content.space))
        return self._taken()

    def _taken(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def _is_open(self, region: str) -> bool:
        """Is a marker a part of the value at hand?"""
        if region == SINK and self._json is not None and self._json.is_open:
            return True
        if self._value is None or region not in ("call", SINK):
            return False
        return self._value.is_open

    def _watch(self, text: str) -> None:
        """Of calls: their first character says how they are written."""
        if self._value is None:
            if not text.strip():
                return
            tools = self._tools
            is_json = tools is None or not tools.values or text.lstrip()[0] in "{["
            self._value = Strings() if tools is None or is_json else tools.openness(self._types)
        self._value.feed(text.translate(self._marks))

    @property
    def _is_call(self) -> bool:
        return self._message.startswith("functions.")

    def _on_text(self, region: str, text: str) -> None:
        kind = self._message if self._is_harmony and region == SINK else region
        if kind == "reasoning":
            self._show("reasoning", self._thought.push(text.translate(self._no_marks)))
        elif kind == SINK:
            self._on_content(text)
        elif region == "call":
            self._watch(text)
        elif region == SINK and self._is_call:
            self._body.append(text)
            self._watch(text)

    def _on_content(self, text: str) -> None:
        """Perhaps all of it is calls, as its first character says."""
        if self._json is not None:
            self._json.feed(text.translate(self._marks))
        if self._bare is None or self._tools is None:
            return self._say(text)
        text, self._lead = self._lead + text, ""
        if self._bare or (text.strip() and text.lstrip()[0] in self._tools.bare):
            self._bare.append(text)
            self._watch(text)
        elif text.strip():
            self._bare = None
            self._say(text)
        else:
            self._lead = text

    def _on_begin(self, region: str, marker: str) -> None:
        self._opener, self._value = "", None
        if region == "call":
            bare, self._bare, self._lead = self._bare, None, ""
            self._say("".join(bare or ()))
            if self._tools is not None and marker.translate(self._marks) in self._tools.kept:
                self._opener = marker

    def _on_end(self, region: str, text: str, is_whole: bool) -> None:
        self._value = None
        if region == "header":
            self._message = _message_of(text.translate(self._marks))
        elif region == "call":
            self._read(self._opener + text, is_whole or not (self._tools and self._tools.closes))
        elif self._is_harmony:
            self._end_message()
        if region == "reasoning":
            self._end_thought()
        self._has_regions = self._has_regions or is_whole

    def _end_thought(self) -> None:
        self._thought.close()
        if not self._has_content:
            self._content.close()

    def _end_message(self) -> None:
        body, self._body = "".join(self._body), []
        message, is_call = self._message, self._is_call
        self._message = "nothing" if self._is_harmony else message
        if message == "reasoning":
            self._end_thought()
        elif is_call:
            name = message.removeprefix("functions.")
            self._emit(body, lambda: harmony(name, body.translate(self._marks)))

    def _read(self, text: str, is_whole: bool) -> None:
        """A call's text, without its markers."""
        tools = self._tools
        assert tools is not None
        plain = text.translate(self._marks)
        if not is_whole and self._is_cut and not tools.bare:
            plain = plain[: tools.end_of_whole(plain)]
            if not plain:
                self.num_unread += 1
                return
        self._emit(text, lambda: tools.notation(plain, self._types))

    def _emit(self, text: str, read: Callable[[], list[Call]]) -> None:
        try:
            calls = read()
            if any(call.name not in self._types for call in calls):
                raise ValueError("there is no such tool")
            written = [_text_of(call.arguments) for call in calls]
        except BROKEN:
            self.num_unread += 1
            if not self._is_cut:
                self._say(text)
            return
        for call, arguments in zip(calls, written, strict=True):
            if self.enough:
                return
            if self.num_calls >= MAX_CALLS:
                self.num_unread += 1
                continue
            index = self.num_calls
            self.num_calls += 1
            self._events += [
                CallBegun(index, self._id_of(call), call.name),
                Arguments(index, arguments),
            ]
            self.enough = self._one_only

    def _id_of(self, call: Call) -> str:
        """The model's own, if it is one: results are told apart by it, and it comes back as a request's."""
        is_one = 0 < len(call.id) <= MAX_ID_CHARS and call.id.isprintable() and call.id not in self._ids
        call_id = call.id if is_one else self._new_id()
        self._ids.add(call_id)
        return call_id

    def _new_id(self) -> str:
        if self._tools is not None and self._tools.id_chars:
            return "".join(secrets.choice(_ALPHABET) for _ in range(self._tools.id_chars))
        return f"call_{secrets.token_hex(12)}"

    def _say(self, text: str) -> None:
        self._has_content = self._has_content or bool(text.strip())
        marks = self._marks if self._json is not None else self._no_marks
        self._show("content", self._content.push(text.translate(marks)))

    def _show(self, kind: Kind, text: str) -> None:
        if text and not self.enough:
            self._events.append(Said(kind, text))


def _text_of(arguments: dict[str, Any]) -> str:
    """JSON that is text: half of a surrogate pair, which an escape can stand for, is no character."""
    text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    return _SURROGATE.sub("\N{REPLACEMENT CHARACTER}", text)


def _message_of(header: str) -> str:
    """``assistant to=functions.f<|channel|>commentary <|constrain|>json`` and the like."""
    to = header.partition("to=")[2].replace("<|", " ").split()
    if to and to[0] != "assistant":
        return to[0] if to[0].startswith("functions.") else "nothing"
    channel = header.rpartition("<|channel|>")[2].strip() or header
    return "reasoning" if channel.startswith("analysis") else SINK
