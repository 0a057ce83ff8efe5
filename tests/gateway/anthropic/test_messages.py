"""What comes of the Messages API at a served gateway; the engine says given tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from tests.support.gateway.anthropic_stream import events_of, message_of
from tests.support.gateway.gateway_world import Served, run
from tests.support.gateway.messages_world import (
    BODY,
    CITY,
    MESSAGES,
    THOUGHT,
    TOOLS,
    WEATHER,
    both,
    served,
)
from tests.support.gateway.talking_model import call, saying

pytestmark = pytest.mark.slow  # a gateway with its helpers, each time


@pytest.mark.parametrize("at_once", [True, False])
def test_a_thought_text_and_two_calls(talker: Path, tokens: Tokenizer, at_once: bool) -> None:
    async def main() -> None:
        async with served(talker) as (world, http):
            text = f"{THOUGHT}Let me see.\n{WEATHER}\n{call('now')}"
            world.router.answer = saying(tokens, text, at_once=at_once)
            message = await both(http, tools=TOOLS)
            thought, said, first, second = message["content"]
            assert thought == {"type": "thinking", "thinking": "hm, now", "signature": ""}
            assert said == {"type": "text", "text": "Let me see."}
            assert (first["type"], first["name"], first["input"]) == ("tool_use", "weather", {"city": CITY})
            assert (second["name"], second["input"]) == ("now", {})
            assert first["id"] != second["id"]
            assert (message["type"], message["role"], message["model"]) == ("message", "assistant", "tiny")
            assert (message["stop_reason"], message["stop_sequence"]) == ("tool_use", None)
            num_thought = len(tokens.encode("\nhm, now\n").ids) + 1
            assert message["usage"]["output_tokens_details"] == {"thinking_tokens": num_thought}

    run(main())


NONE, NOW = {"type": "none"}, {"type": "tool", "name": "now"}
ONE = {"type": "auto", "disable_parallel_tool_use": True}
Case = tuple[str, str, dict[str, Any], list[str], tuple[str, str | None]]
CASES: list[Case] = [
    # text, reason of the engine, what the client says, kinds of blocks, why it ended
    ("It is 12 °C.", "stop", {}, ["text"], ("end_turn", None)),
    ("It is 12", "length", {}, ["text"], ("max_tokens", None)),
    ("", "stop", {}, [], ("end_turn", None)),
    ("a, b; c", "stop", {"stop_sequences": [";", ","]}, ["text"], ("stop_sequence", ",")),
    (
        f"{THOUGHT}x; y",
        "stop",
        {"stop_sequences": [",", "; y"]},
        ["thinking", "text"],
        ("stop_sequence", "; y"),
    ),
    (WEATHER, "stop", {"tools": TOOLS, "stop_sequences": ["日"]}, ["tool_use"], ("tool_use", None)),
    (f"x {WEATHER}", "stop", {"tools": TOOLS, "tool_choice": NONE}, ["text"], ("end_turn", None)),
    (call("now"), "stop", {"tools": TOOLS, "tool_choice": NOW}, ["tool_use"], ("tool_use", None)),
    (f"{WEATHER}{WEATHER} y", "stop", {"tools": TOOLS, "tool_choice": ONE}, ["tool_use"], ("tool_use", None)),
    (f"{WEATHER} and", "length", {"tools": TOOLS}, ["tool_use", "text"], ("max_tokens", None)),
    (f"x {WEATHER[:40]}", "length", {"tools": TOOLS}, ["text"], ("max_tokens", None)),
]


@pytest.mark.parametrize(("text", "reason", "asked", "kinds", "ended"), CASES)
def test_what_comes_of_it(
    talker: Path,
    tokens: Tokenizer,
    text: str,
    reason: str,
    asked: dict[str, Any],
    kinds: list[str],
    ended: tuple[str, str | None],
) -> None:
    async def main() -> None:
        async with served(talker) as (world, http):
            world.router.answer = saying(tokens, text, reason=reason)
            message = await both(http, **asked)
            assert [block["type"] for block in message["content"]] == kinds
            assert (message["stop_reason"], message["stop_sequence"]) == ended

    run(main())


def test_who_waits_is_pinged(talker: Path, tokens: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("microserve.gateway.http.sse.PING_S", 0.05)

    async def main() -> None:
        async with served(talker) as (world, http):
            async with http.stream("POST", MESSAGES, json={**BODY, "stream": True}) as reply:
                request = await world.router.request()
                frames = reply.aiter_bytes()
                data = await anext(frames)
                assert data.startswith(b"event: message_start\n") and data.endswith(
                    b'data: {"type":"ping"}\n\n'
                )
                saying(tokens, "yes")(request)
                async for frame in frames:
                    data += frame
            message = message_of(data)
            assert message["content"] == [{"type": "text", "text": "yes"}]

    run(main())


def test_a_stream_that_breaks_says_so(talker: Path, tokens: Tokenizer) -> None:
    async def main() -> None:
        async with served(talker) as (world, http):

            def answer(request: Served) -> None:
                request.send(tokens.encode("some").ids)
                request.end("error", code="engine_lost", detail="e1 is gone")

            world.router.answer = answer
            reply = await http.post(MESSAGES, json={**BODY, "stream": True})
            *_, last = events_of(reply.content)
            assert reply.status_code == 200
            assert (last["type"], last["error"]["type"], last["error"]["code"]) == (
                "error",
                "api_error",
                "engine_lost",
            )
            assert b"message_stop" not in reply.content
            whole = await http.post(MESSAGES, json=BODY)
            assert (whole.status_code, whole.json()["error"]["type"]) == (502, "api_error")

    run(main())
