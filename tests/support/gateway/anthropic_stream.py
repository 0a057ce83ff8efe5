"""A stream of Anthropic's events as its clients add it up, by the rules of the API and by nothing of ours."""

from __future__ import annotations

import json
from typing import Any


def events_of(data: bytes) -> list[dict[str, Any]]:
    """Each event's data; that each is framed as it must be, with its name twice."""
    found: list[dict[str, Any]] = []
    for frame in data.decode().split("\n\n")[:-1]:
        if frame.startswith(":"):
            continue
        name, content = frame.split("\n")
        event = json.loads(content.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        found.append(event)
    return found


def added_up(data: bytes) -> list[dict[str, Any]]:
    """The content of the message: one block after the other begins, grows and ends by its own number."""
    blocks: list[dict[str, Any]] = []
    inputs: list[str] = []
    is_open = False
    for event in events_of(data):
        match event["type"]:
            case "content_block_start":
                assert not is_open and event["index"] == len(blocks)
                is_open = True
                blocks.append(event["content_block"])
                inputs.append("")
            case "content_block_delta":
                assert is_open and event["index"] == len(blocks) - 1
                _add(blocks[-1], inputs, event["delta"])
            case "content_block_stop":
                assert is_open and event["index"] == len(blocks) - 1
                is_open = False
                if blocks[-1]["type"] == "tool_use":
                    assert blocks[-1]["input"] == {}
                    blocks[-1]["input"] = json.loads(inputs[-1] or "{}")
    assert not is_open
    return blocks


def _add(block: dict[str, Any], inputs: list[str], delta: dict[str, Any]) -> None:
    match block["type"], delta["type"]:
        case "text", "text_delta":
            block["text"] += delta["text"]
        case "thinking", "thinking_delta":
            block["thinking"] += delta["thinking"]
        case "thinking", "signature_delta":
            block["signature"] = delta["signature"]
        case "tool_use", "input_json_delta":
            inputs[-1] += delta["partial_json"]
        case kind:
            raise AssertionError(f"no delta of such a block: {kind}")


def message_of(data: bytes) -> dict[str, Any]:
    """The whole message of a stream that went well: one begin, one end, pings anywhere between."""
    events = [each for each in events_of(data) if each["type"] != "ping"]
    kinds = [each["type"] for each in events]
    assert kinds[0] == "message_start" and kinds[-2:] == ["message_delta", "message_stop"]
    assert kinds.count("message_start") == kinds.count("message_delta") == kinds.count("message_stop") == 1
    message: dict[str, Any] = events[0]["message"]
    assert (message["content"], message["stop_reason"], message["stop_sequence"]) == ([], None, None)
    message["content"] = added_up(data)
    message |= events[-2]["delta"]
    message["usage"] |= events[-2]["usage"]
    return message
