"""What Open Responses asks of a server, in our words: each of its cases, on an engine that says given tokens.

Images are not among them: models here read text.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from tokenizers import Tokenizer

from microserve.gateway.responses.replies import ResponseReply
from tests.support.gateway.gateway_world import gateway_world, run
from tests.support.gateway.responses_bodies import folded
from tests.support.gateway.talking_model import call, make_talking_model, saying, talking_tokenizer


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_talking_model(tmp_path_factory.mktemp("model") / "talker")


@pytest.fixture(scope="module")
def tokens() -> Tokenizer:
    return talking_tokenizer()


def message(role: str, content: str) -> dict[str, Any]:
    return {"type": "message", "role": role, "content": content}


WEATHER = {
    "type": "function",
    "name": "weather",
    "description": "The weather of a city, now.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "description": "Its name, and that of its country."}},
        "required": ["city"],
    },
}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
CASES: dict[str, tuple[dict[str, Any], str, str]] = {
    # The fields, what the engine says, and the type of an item that must be there.
    "text": ({"input": [message("user", "Greet me in three words.")]}, "Hello, my friend", "message"),
    "system prompt": (
        {"input": [message("system", "You are a pirate."), message("user", "Greet me.")]}, "Ahoy!", "message",
    ),
    "call of a tool": (
        {"input": [message("user", "What is the weather in Oslo?")], "tools": [WEATHER]},
        call("weather", city="Oslo, Norway"), "function_call",
    ),
    "several turns": (
        {"input": [message("user", "I am A."), message("assistant", "Hello A."), message("user", "Who?")]},
        "A.", "message",
    ),
    "structured output": (
        {"input": "A number?", "text": {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA}}},
        '{"a": 1}', "message",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_case_of_open_responses(talker: Path, tokens: Tokenizer, name: str) -> None:
    """Whole and streamed: a response of the right shape with all of its members, completed; events whose
    order is right and that add up to it."""
    fields, said, kind = CASES[name]

    async def main() -> None:
        async with (
            gateway_world(talker, max_model_len=2048) as world,
            httpx.AsyncClient(base_url=world.address, timeout=20.0) as http,
        ):
            world.router.answer = saying(tokens, said)
            reply = await http.post("/v1/responses", json={"model": "tiny", **fields, "stream": False})
            assert reply.status_code == 200, reply.text
            whole = reply.json()
            assert {each.name for each in msgspec.structs.fields(ResponseReply)} == whole.keys()
            msgspec.convert(whole, ResponseReply)
            assert whole["status"] == "completed"
            assert kind in [item["type"] for item in whole["output"]]

            stream = await http.post("/v1/responses", json={"model": "tiny", **fields, "stream": True})
            assert stream.headers["content-type"].startswith("text/event-stream")
            events = [json.loads(each.partition("data: ")[2]) for each in stream.text.split("\n\n") if each]
            assert [event["sequence_number"] for event in events] == list(range(len(events)))
            created, in_progress, *growing, completed = events
            assert [each["type"] for each in (created, in_progress, completed)] == [
                "response.created", "response.in_progress", "response.completed",
            ]  # fmt: skip
            assert folded(growing) == completed["response"]["output"]
            assert {each["response"]["id"] for each in (created, in_progress, completed)} == {
                completed["response"]["id"]
            }
            msgspec.convert(completed["response"], ResponseReply)
            if kind == "function_call":
                told = [event["type"].removeprefix("response.") for event in growing]
                assert told == [
                    "output_item.added", "function_call_arguments.delta", "function_call_arguments.done",
                    "output_item.done",
                ]  # fmt: skip

    run(main())
