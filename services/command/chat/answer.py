"""One answer, from the events of its stream: what it thinks, says and calls, and how it ended. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from microserve.services.command.client.chunk import DONE, CallDelta, error_of, read_chunk

THOUGHT, TEXT = "thought", "text"
STOPPED = "stopped"
"""Fault of an answer that its reader ended."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What is shown as it comes."""

    kind: str
    text: str


@dataclass(slots=True)
class Call:
    """Of a tool."""

    id: str = ""
    name: str = ""
    arguments: str = ""


@dataclass(slots=True)
class Answer:
    text: str = ""
    thought: str = ""
    calls: dict[int, Call] = field(default_factory=dict)
    finish_reason: str = ""
    num_prompt_tokens: int = 0
    num_answer_tokens: int = 0
    """0: not said."""
    is_done: bool = False
    fault: str = ""
    """Why it is not whole."""
    was_refused: bool = False
    """The server said no and began none."""
    served_by: dict[str, str] = field(default_factory=dict)
    """Headers ``x-microserve-*``, by the rest of their names."""
    first_s: float = 0.0
    """From the question to the first of it."""
    total_s: float = 0.0

    @property
    def has_anything(self) -> bool:
        return bool(self.text or self.calls)

    def message(self) -> dict[str, Any]:
        """For the conversation; thoughts stay out of it, as models' templates want it."""
        message: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self.calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in self.calls.values()
            ]
        return message

    def push(self, data: bytes) -> list[Piece]:
        """Take one event's data; the pieces to show. What is no chunk is a fault."""
        if data == DONE:
            self.is_done = True
            return []
        try:
            chunk = read_chunk(data)
        except (ValueError, RecursionError):
            self._fail("the server sent what is no part of an answer")
            return []
        if chunk.error is not None:
            self._fail(error_of(chunk.error))
        if chunk.usage is not None:
            self.num_prompt_tokens = chunk.usage.prompt_tokens
            self.num_answer_tokens = chunk.usage.completion_tokens
        pieces = []
        for choice in chunk.choices:
            if choice.index != 0:
                continue
            self.finish_reason = choice.finish_reason or self.finish_reason
            if choice.delta is None:
                continue
            if thought := choice.delta.thought:
                self.thought += thought
                pieces.append(Piece(THOUGHT, thought))
            if text := choice.delta.content:
                self.text += text
                pieces.append(Piece(TEXT, text))
            for delta in choice.delta.tool_calls or ():
                self._add(delta)
        return pieces

    def _add(self, delta: CallDelta) -> None:
        call = self.calls.setdefault(delta.index, Call())
        call.id = delta.id or call.id
        if delta.function is not None:
            call.name = delta.function.name or call.name
            call.arguments += delta.function.arguments or ""

    def end(self, fault: str) -> None:
        """The stream is over; ``fault``: why before its end. A call that is not whole is none."""
        if fault:
            self._fail(fault)
        elif not self.is_done:
            self._fail("the stream ended before the answer")
        if self.fault:
            self.calls.clear()

    def _fail(self, fault: str) -> None:
        self.fault = self.fault or fault
