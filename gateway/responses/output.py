"""The items that an answer grows: thoughts, messages and calls, and what is told of their growing.

Owns the order of items and of events, and the names of items. Pure state: the same pieces make the same items
and events, whether anybody streams them or not. Knows no response around them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from microserve.gateway.parsing.events import Arguments, CallBegun, Event, Said
from microserve.gateway.responses.ids import item_id
from microserve.gateway.responses.thought import sealed
from microserve.gateway.text.answer.choice import Piece
from microserve.gateway.text.answer.transcript import TokenText

Told = tuple[str, dict[str, Any]]
"""An event's type, and its members but the number."""


class Output:
    """Of one response: ``take`` pieces, then ``close``."""

    def __init__(self, unique: str, *, encrypts: bool = False) -> None:
        """``encrypts``: thoughts are told as ``encrypted_content``, too."""
        self.items: list[dict[str, Any]] = []
        """All but the last are whole; that is so behind :meth:`close`."""
        self._unique = unique
        self._encrypts = encrypts
        self._texts: list[str] = []
        """Of the last item."""
        self._logprobs: list[dict[str, Any]] = []
        self._spare: list[dict[str, Any]] = []
        """Of tokens that have come without a text, while no message was open."""
        self._is_open = False

    def take(self, piece: Piece) -> list[Told]:
        told: list[Told] = []
        events: Sequence[Event] = piece.events or ([Said("content", piece.text)] if piece.text else ())
        logprobs, self._spare = [*self._spare, *map(_logprob, piece.tokens)], []
        for event in events:
            match event:
                case Said("reasoning", text):
                    told += self._grow("reasoning", text, [])
                case Said(_, text):
                    told += self._grow("message", text, logprobs)
                    logprobs = []
                case CallBegun(_, call_id, name):
                    told += self._begin("function_call", call_id=call_id, name=name, arguments="")
                case Arguments(_, text):
                    told += self._grow("function_call", text, [])
        if logprobs and self._is_open and self.items[-1]["type"] != "message":
            self._spare += logprobs
        elif logprobs:  # of tokens without a text of their own
            told += self._grow("message", "", logprobs)
        return told

    def close(self, *, is_cut: bool) -> list[Told]:
        """Nothing more comes. An answer that says nothing is a message of no text."""
        told = [] if self.items else self._begin("message")
        return told + self._end("incomplete" if is_cut else "completed")

    def _grow(self, kind: str, text: str, logprobs: list[dict[str, Any]]) -> list[Told]:
        told: list[Told] = []
        if not self._is_open or self.items[-1]["type"] != kind:
            told += self._begin(kind)
        self._texts.append(text)
        self._logprobs += logprobs
        delta = {**self._place(kind), "delta": text}
        if kind == "message":
            delta["logprobs"] = logprobs
        told.append((f"{_EVENTS[kind]}.delta", delta))
        return told

    def _begin(self, kind: str, **members: Any) -> list[Told]:
        told = self._end("completed")
        item: dict[str, Any] = {"id": item_id(kind, self._unique, len(self.items)), "type": kind}
        item |= _BLANK[kind] | members
        self.items.append(item | {"status": "in_progress"})
        self._is_open = True
        self._texts, self._logprobs = [], []
        told.append(
            ("response.output_item.added", {"output_index": self._index, "item": self.items[-1].copy()})
        )
        if kind != "function_call":
            told.append(("response.content_part.added", {**self._place(kind), "part": self._part(kind)}))
        return told

    def _end(self, status: str) -> list[Told]:
        if not self._is_open:
            return []
        self._is_open = False
        item, text = self.items[-1], "".join(self._texts)
        kind: str = item["type"]
        told: list[Told] = []
        if kind == "function_call":
            item["arguments"] = text
            done = {**self._place(kind), "name": item["name"], "arguments": text}
            told.append((f"{_EVENTS[kind]}.done", done))
        else:
            part = self._part(kind)
            item["content"] = [part]
            done = {**self._place(kind), "text": text}
            if kind == "message":
                done["logprobs"] = self._logprobs
            told.append((f"{_EVENTS[kind]}.done", done))
            told.append(("response.content_part.done", {**self._place(kind), "part": part}))
        if kind == "reasoning" and self._encrypts:
            item["encrypted_content"] = sealed(text)
        item["status"] = status
        told.append(("response.output_item.done", {"output_index": self._index, "item": item}))
        return told

    @property
    def _index(self) -> int:
        return len(self.items) - 1

    def _place(self, kind: str) -> dict[str, Any]:
        place = {"item_id": self.items[-1]["id"], "output_index": self._index}
        return place if kind == "function_call" else {**place, "content_index": 0}

    def _part(self, kind: str) -> dict[str, Any]:
        text = "".join(self._texts)
        if kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": self._logprobs.copy()}


_BLANK: dict[str, dict[str, Any]] = {
    "message": {"role": "assistant", "content": []},
    "reasoning": {"summary": [], "content": []},
    "function_call": {},
}
_EVENTS = {
    "message": "response.output_text",
    "reasoning": "response.reasoning_text",
    "function_call": "response.function_call_arguments",
}


def _logprob(token: TokenText) -> dict[str, Any]:
    return _entry(token) | {"top_logprobs": [_entry(other) for other in token.top]}


def _entry(token: TokenText) -> dict[str, Any]:
    return {"token": token.text, "logprob": token.logprob, "bytes": list(token.data)}
