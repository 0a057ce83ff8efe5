"""What is read of an answer: a chunk of a stream, its usage, and errors in the shapes that servers give them.

Reads ``/v1/chat/completions`` and ``/v1/completions``; members that nobody here asks for are passed over.
"""

from __future__ import annotations

from typing import Any

import msgspec

DONE = b"[DONE]"
MAX_ERROR_CHARS = 400


class Function(msgspec.Struct):
    name: str | None = None
    arguments: str | None = None


class CallDelta(msgspec.Struct):
    """A part of a call: its id and name come once, its arguments in pieces."""

    index: int = 0
    id: str | None = None
    function: Function | None = None


class Delta(msgspec.Struct):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    """The same under its other name; who has both says the same twice."""
    tool_calls: list[CallDelta] | None = None

    @property
    def thought(self) -> str:
        return self.reasoning or self.reasoning_content or ""


class Choice(msgspec.Struct):
    index: int = 0
    delta: Delta | None = None
    """Of a chat."""
    text: str | None = None
    """Of a completion."""
    finish_reason: str | None = None

    @property
    def says_something(self) -> bool:
        delta = self.delta
        if delta is None:
            return bool(self.text)
        return bool(delta.content or delta.thought or delta.tool_calls)


class Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Chunk(msgspec.Struct):
    choices: list[Choice] = []
    usage: Usage | None = None
    error: Any = None


_chunk = msgspec.json.Decoder(Chunk)


def read_chunk(data: bytes) -> Chunk:
    """Raises :class:`ValueError` for what is no chunk."""
    return _chunk.decode(data)


def error_of(value: Any) -> str:
    """The sentence in an error: OpenAI's envelope, its inside, FastAPI's ``detail``, or a text."""
    if isinstance(value, dict):
        for name in ("error", "message", "detail"):
            if value.get(name):
                return error_of(value[name])
    text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    text = " ".join(text.split())
    return text if len(text) <= MAX_ERROR_CHARS else f"{text[:MAX_ERROR_CHARS]}..."


def error_in(body: bytes) -> str:
    """The sentence in the body of a refusal; empty if it has none."""
    try:
        return error_of(msgspec.json.decode(body))
    except (ValueError, RecursionError):
        return error_of(body.decode(errors="replace"))
