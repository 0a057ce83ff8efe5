"""What an answer says, event by event -> blocks of a message: as they grow, and as a whole.

Owns which block is open, and the numbers of blocks. Two ways that come to one end, which a test holds one
against the other. Knows nothing of usage or of why an answer ended.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import msgspec

from microserve.gateway.parsing.events import Arguments, CallBegun, Event, Said

encode = msgspec.json.Encoder().encode

SIGNATURE = ""
"""Of thoughts: nothing here could be told from a forged one, and none is asked for."""

_Open = Literal["text", "thinking", "tool_use"]
_STOP_HEAD = b'event: content_block_stop\ndata: {"type":"content_block_stop","index":'


def sse(name: str, fields: dict[str, Any]) -> bytes:
    """One event of a stream, which has its name twice."""
    return b"event: %b\ndata: %b\n\n" % (name.encode(), encode({"type": name, **fields}))


class BlockStream:
    """The blocks of one streamed answer: one is open at a time, and their numbers rise."""

    def __init__(self, *, shows_thoughts: bool = True) -> None:
        self._open: _Open | None = None
        self._index = -1
        self._shows_thoughts = shows_thoughts
        self._delta_head = self._delta_tail = b""
        """Around the JSON text of a delta of the open block: a token costs one ``encode`` of a string."""

    def say(self, text: str) -> bytes:
        """Events of more text."""
        if self._open == "text":
            return b"%b%b%b" % (self._delta_head, encode(text), self._delta_tail)
        return self._begin("text", {"text": ""}, "text_delta", "text") + self.say(text)

    def push(self, events: Iterable[Event]) -> bytes:
        return b"".join(map(self._of_event, events))

    def close(self) -> bytes:
        """Events that end the open block, if there is one."""
        if self._open is None:
            return b""
        signed = b""
        if self._open == "thinking":
            delta = {"type": "signature_delta", "signature": SIGNATURE}
            signed = sse("content_block_delta", {"index": self._index, "delta": delta})
        self._open = None
        return b"%b%b%d}\n\n" % (signed, _STOP_HEAD, self._index)

    def _of_event(self, event: Event) -> bytes:
        match event:
            case Said(_, ""):
                return b""
            case Said("content", text):
                return self.say(text)
            case Said(_, text):
                return self._think(text)
            case CallBegun(_, call_id, name):
                block = {"id": call_id, "name": name, "input": {}}
                return self._begin("tool_use", block, "input_json_delta", "partial_json")
            case Arguments(_, text):
                return b"%b%b%b" % (self._delta_head, encode(text), self._delta_tail)

    def _think(self, text: str) -> bytes:
        begun = b""
        if self._open != "thinking":
            block = {"thinking": "", "signature": SIGNATURE}
            begun = self._begin("thinking", block, "thinking_delta", "thinking")
        if not self._shows_thoughts:
            return begun
        return b"%b%b%b%b" % (begun, self._delta_head, encode(text), self._delta_tail)

    def _begin(self, kind: _Open, block: dict[str, Any], delta: str, member: str) -> bytes:
        closed = self.close()
        self._open = kind
        self._index += 1
        self._delta_head = (
            b'event: content_block_delta\ndata: {"type":"content_block_delta","index":%d,'
            b'"delta":{"type":"%b","%b":' % (self._index, delta.encode(), member.encode())
        )
        self._delta_tail = b"}}\n\n"
        block = {"type": kind, **block}
        return closed + sse("content_block_start", {"index": self._index, "content_block": block})


def whole_blocks(events: Sequence[Event], *, shows_thoughts: bool = True) -> list[dict[str, Any]]:
    """``content`` of a reply."""
    blocks: list[dict[str, Any]] = []
    texts: list[list[str]] = []
    """Of each block, what its last member is made of."""
    for event in events:
        last = blocks[-1]["type"] if blocks else None
        match event:
            case Said(_, ""):
                continue
            case Said("content", text):
                if last != "text":
                    blocks.append({"type": "text"})
                    texts.append([])
            case Said(_, text):
                if last != "thinking":
                    blocks.append({"type": "thinking", "signature": SIGNATURE})
                    texts.append([])
            case CallBegun(_, call_id, name):
                blocks.append({"type": "tool_use", "id": call_id, "name": name})
                texts.append([])
                continue
            case Arguments(_, text):
                pass
        texts[-1].append(text)
    for block, parts in zip(blocks, texts, strict=True):
        text = "".join(parts)
        match block["type"]:
            case "text":
                block["text"] = text
            case "thinking":
                block["thinking"] = text if shows_thoughts else ""
            case _:
                block["input"] = msgspec.Raw(
                    text.encode() or b"{}"
                )  # whoever has read the call knows that it is an object
    return blocks
