"""The Responses API as OpenAI's own client sees it: the engine says given tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import openai
import pydantic
import pytest
from tokenizers import Tokenizer

from microserve.protocol.messages.engine import TokenLogprob
from tests.support.gateway.gateway_world import GatewayWorld, Served, gateway_world, run
from tests.support.gateway.talking_model import TOOLS, call, make_talking_model, saying, talking_tokenizer

pytestmark = pytest.mark.slow  # a gateway with its helpers, each time

THOUGHT = "<think>\nhm, now\n</think>\n\n"
FLAT: list[Any] = [{"type": "function", **tool["function"]} for tool in TOOLS]
"""The same tools, as this API has them."""
IMAGE = [{"type": "input_image"}]


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_talking_model(tmp_path_factory.mktemp("model") / "talker")


@pytest.fixture(scope="module")
def tokens() -> Tokenizer:
    return talking_tokenizer()


def client_of(world: GatewayWorld) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{world.address}/v1", api_key="none", max_retries=0)


def prompt_of(served: Served, tokens: Tokenizer) -> str:
    return tokens.decode(served.tokens, skip_special_tokens=False)


async def both(client: openai.AsyncOpenAI, **fields: Any) -> Any:
    """The answer as a whole, which a stream of it must add up to."""
    asked: dict[str, Any] = {"model": "tiny", "input": "hi", **fields}
    whole = await client.responses.create(**asked)
    async with client.responses.stream(**asked) as stream:
        events = [event async for event in stream]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    last: Any = events[-1]
    assert last.type == f"response.{whole.status}"
    assert plain(last.response) == plain(whole)
    return whole


def plain(response: Any) -> Any:
    """Without names and times, which differ from one to the next."""
    content = json.loads(response.model_dump_json(exclude_unset=True))
    for item in content["output"]:
        for name in ("id", "call_id", "parsed_arguments"):
            item.pop(name, None)
        for part in item.get("content", ()):
            part.pop("parsed", None)
    return content["output"], content["usage"], content["status"], content["incomplete_details"]


def test_a_text_is_answered_whole_and_streamed(talker: Path, tokens: Tokenizer) -> None:
    async def main() -> None:
        async with gateway_world(talker) as world, client_of(world) as client:
            world.router.answer = saying(tokens, "Hello 😀!")
            response = await both(client, instructions="be brief")
            assert response.output_text == "Hello 😀!"
            assert (response.status, response.model, response.object) == ("completed", "tiny", "response")
            assert response.instructions == "be brief"
            assert response.usage.input_tokens > 0
            assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens
            served = list(world.router.served.values())[-1]
            assert prompt_of(served, tokens) == (
                "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
                "<|im_start|>assistant\n"
            )

    run(main())


def test_thoughts_text_and_calls_are_items_in_their_order(talker: Path, tokens: Tokenizer) -> None:
    said = THOUGHT + "So:" + call("weather", city="Zürich") + call("now")

    async def main() -> None:
        async with gateway_world(talker, max_model_len=2048) as world, client_of(world) as client:
            world.router.answer = saying(tokens, said)
            response = await both(client, tools=FLAT, include=["reasoning.encrypted_content"])
            thought, message, weather, now = response.output
            assert (thought.type, thought.content[0].text) == ("reasoning", "hm, now")
            assert thought.encrypted_content
            assert (message.type, message.content[0].text) == ("message", "So:")
            assert (weather.type, weather.name, json.loads(weather.arguments)) == (
                "function_call", "weather", {"city": "Zürich"},
            )  # fmt: skip
            assert (now.name, json.loads(now.arguments)) == ("now", {})
            assert weather.call_id != now.call_id
            assert response.usage.output_tokens_details.reasoning_tokens > 0

    run(main())


def test_a_loop_of_calls_and_results(talker: Path, tokens: Tokenizer) -> None:
    """What came out goes in again, as clients do it: thoughts, calls and results find their places."""

    async def main() -> None:
        async with gateway_world(talker, max_model_len=2048) as world, client_of(world) as client:
            world.router.answer = saying(tokens, THOUGHT + call("weather", city="Oslo"))
            items: list[Any] = [{"role": "user", "content": "hi"}]
            first = await client.responses.create(model="tiny", input=items, tools=FLAT)
            [weather] = [item for item in first.output if item.type == "function_call"]
            items += first.output
            items.append({"type": "function_call_output", "call_id": weather.call_id, "output": "rain"})
            world.router.answer = saying(tokens, "It rains.")
            second = await client.responses.create(model="tiny", input=items, tools=FLAT)
            assert second.output_text == "It rains."
            text = prompt_of(list(world.router.served.values())[-1], tokens)
            assert text.endswith(
                '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>\n'
                "<|im_start|>tool\nrain<|im_end|>\n<|im_start|>assistant\n"
            )

    run(main())


class City(pydantic.BaseModel):
    name: str


def test_a_schema_is_parsed_and_goes_to_the_engine(talker: Path, tokens: Tokenizer) -> None:
    async def main() -> None:
        async with gateway_world(talker) as world, client_of(world) as client:
            world.router.answer = saying(tokens, '{"name": "Oslo"}')
            parsed = await client.responses.parse(model="tiny", input="hi", text_format=City)
            assert parsed.output_parsed == City(name="Oslo")
            [served] = world.router.served.values()
            grammar = served.message.sampling.grammar
            assert grammar is not None and grammar.kind == "json_schema"
            assert json.loads(grammar.text)["properties"]["name"]["type"] == "string"
            with pytest.raises(openai.BadRequestError) as refused:
                await client.responses.create(
                    model="tiny",
                    input="hi",
                    text={"format": {"type": "json_schema", "name": "n", "schema": {"uniqueItems": True}}},
                )
            assert refused.value.param == "text.format.schema"

    run(main())


def test_a_call_that_must_be_made_is_enforced(talker: Path, tokens: Tokenizer) -> None:
    async def main() -> None:
        async with gateway_world(talker, max_model_len=2048) as world, client_of(world) as client:
            world.router.answer = saying(tokens, call("weather", city="Oslo"))
            asked: dict[str, Any] = {"model": "tiny", "input": "hi", "tools": FLAT}
            choices: list[tuple[Any, int]] = [("required", 2), ({"type": "function", "name": "weather"}, 1)]
            for choice, named in choices:
                response = await client.responses.create(**asked, tool_choice=choice)
                assert [item.type for item in response.output] == ["function_call"]
                assert response.status == "completed"
                grammar = list(world.router.served.values())[-1].message.sampling.grammar
                assert grammar is not None and grammar.kind == "lark"
                assert sum(f'"name\\": \\"{name}' in grammar.text for name in ("weather", "now")) == named

    run(main())


def test_an_answer_that_is_cut_is_incomplete(talker: Path, tokens: Tokenizer) -> None:
    def cut(served: Served) -> None:
        served.send(tokens.encode("Hello").ids)
        served.end("length")

    async def main() -> None:
        async with gateway_world(talker) as world, client_of(world) as client:
            world.router.answer = cut
            response = await both(client, max_output_tokens=3)
            assert response.status == "incomplete"
            assert response.incomplete_details.reason == "max_output_tokens"
            assert response.output_text == "Hello"
            assert response.max_output_tokens == 3

    run(main())


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"model": "other"}, 404, "model"),
        ({"max_output_tokens": 5000}, 400, "max_output_tokens"),
        ({"input": "x " * 3000}, 400, "input"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            400,
            "input[0].content[0].type",
        ),
        ({"reasoning": {"effort": "low"}, "text": {"verbosity": "low"}}, 400, "text.verbosity"),
        ({"tools": [{"type": "mcp"}]}, 400, "tools[0].type"),
        ({"background": True}, 400, "background"),
    ],
)
def test_what_is_refused_is_named_in_openais_envelope(
    talker: Path, fields: dict[str, Any], status: int, param: str
) -> None:
    async def main() -> None:
        async with gateway_world(talker) as world, httpx.AsyncClient(base_url=world.address) as http:
            reply = await http.post("/v1/responses", json={"model": "tiny", "input": "hi", **fields})
            error = reply.json()["error"]
            assert (reply.status_code, error["param"], error["type"]) == (
                status, param, "invalid_request_error",
            )  # fmt: skip
            assert not world.router.served

    run(main())


def test_a_stream_that_breaks_ends_in_a_failed_response(talker: Path, tokens: Tokenizer) -> None:
    def breaking(served: Served) -> None:
        served.send(tokens.encode("Hello").ids)
        served.end("error", code="engine_lost", detail="e0 is gone")

    async def main() -> None:
        async with gateway_world(talker) as world, client_of(world) as client:
            world.router.answer = breaking
            stream = await client.responses.create(model="tiny", input="hi", stream=True)
            events: list[Any] = [event async for event in stream]
            assert [event.sequence_number for event in events] == list(range(len(events)))
            assert [event.type for event in events[-2:]] == ["error", "response.failed"]
            assert events[-1].response.error.message == "e0 is gone"
            with pytest.raises(openai.APIStatusError):
                await client.responses.create(model="tiny", input="hi")

    run(main())


def test_log_probabilities_come_with_the_text(talker: Path, tokens: Tokenizer) -> None:
    def answer(served: Served) -> None:
        for token_id in tokens.encode("Hello world").ids:
            served.send([token_id], logprobs=[TokenLogprob(-0.5, [(token_id, -0.5), (5, -1.0)])])
        served.end("stop")

    async def main() -> None:
        async with gateway_world(talker) as world, client_of(world) as client:
            world.router.answer = answer
            response = await both(client, include=["message.output_text.logprobs"], top_logprobs=2)
            [part] = response.output[0].content
            assert "".join(entry.token for entry in part.logprobs) == part.text == "Hello world"
            assert all(len(entry.top_logprobs) == 2 for entry in part.logprobs)
            assert response.top_logprobs == 2

    run(main())


def test_a_large_body_is_what_a_small_one_is(talker: Path, tokens: Tokenizer) -> None:
    """A helper reads it; the response tells the same again."""
    fields: dict[str, Any] = {
        "model": "tiny", "input": [{"role": "user", "content": "hi"}], "tools": FLAT, "temperature": 0.5,
        "metadata": {"a": "b"}, "instructions": "be brief", "max_output_tokens": 9, "seed": 7,
    }  # fmt: skip

    async def main() -> None:
        async with (
            gateway_world(talker, max_model_len=2048) as world,
            httpx.AsyncClient(base_url=world.address, timeout=20.0) as http,
        ):
            world.router.answer = saying(tokens, "Hello")
            replies = []
            for more in ({}, {"padding": "x" * (100 << 10)}):
                reply = await http.post("/v1/responses", json=fields | more)
                assert reply.status_code == 200, reply.text
                replies.append({**reply.json(), "id": "", "created_at": 0, "completed_at": 0, "output": []})
            assert replies[0] == replies[1]
            small, large = world.router.served.values()
            assert small.tokens == large.tokens
            assert small.message.sampling == large.message.sampling

    run(main())
