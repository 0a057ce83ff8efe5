"""The API as clients see it, with OpenAI's own client, against a router that the test plays."""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from structlog.testing import capture_logs
from tokenizers import Tokenizer

from microserve.protocol import log
from microserve.protocol.messages.engine import TokenLogprob
from microserve.protocol.messages.router import PHASES
from tests.support.gateway.gateway_world import GatewayWorld, Served, gateway_world, run, special_id

USER: list[Any] = [{"role": "user", "content": "hi"}]


def saying(tokenizer: Tokenizer, text: str, **ended: Any) -> Callable[[Served], None]:
    """A router that answers every request with ``text``, a token a message, then the stop token."""
    ids, stop = tokenizer.encode(text).ids, special_id(tokenizer, "<|im_end|>")

    def answer(served: Served) -> None:
        wanted = served.message.sampling.logprobs
        for token_id in [*ids, stop]:
            logprobs = (
                [] if wanted is None else [TokenLogprob(-0.25, [(token_id, -0.25), (0, -2.0)][:wanted])]
            )
            end = served.ended("stop", stop_token_id=stop, **ended) if token_id == stop else None
            served.send([token_id], logprobs=logprobs, ended=end)

    return answer


def client_of(world: GatewayWorld) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{world.address}/v1", api_key="none", max_retries=0)


def http_of(world: GatewayWorld, **options: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=world.address, timeout=20.0, **options)


def events_of(body: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in body.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def test_chat(model: Path, raw_tokenizer: Tokenizer) -> None:
    async def main() -> None:
        async with gateway_world(model) as world, client_of(world) as client:
            world.router.answer = saying(raw_tokenizer, "Hello 😀!", cached_tokens=4)
            reply = await client.chat.completions.create(model="tiny", messages=USER)
            [choice] = reply.choices
            assert (choice.message.role, choice.message.content) == ("assistant", "Hello 😀!")
            assert choice.finish_reason == "stop"
            assert reply.id.startswith("chatcmpl-") and reply.object == "chat.completion"
            [served] = world.router.served.values()
            prompt = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
            assert raw_tokenizer.decode(served.tokens, skip_special_tokens=False) == prompt
            assert reply.usage is not None and reply.usage.prompt_tokens_details is not None
            assert reply.usage.prompt_tokens == len(served.tokens)
            assert reply.usage.completion_tokens == len(raw_tokenizer.encode("Hello 😀!").ids) + 1
            assert reply.usage.prompt_tokens_details.cached_tokens == 4

    run(main())


def test_chat_stream(model: Path, raw_tokenizer: Tokenizer) -> None:
    async def main() -> None:
        async with gateway_world(model) as world, client_of(world) as client:
            world.router.answer = saying(raw_tokenizer, "Hello 😀!")
            stream = await client.chat.completions.create(
                model="tiny", messages=USER, stream=True, stream_options={"include_usage": True}
            )
            chunks = [chunk async for chunk in stream]
            assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
            assert chunks[0].choices[0].delta.role == "assistant"
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
            assert text == "Hello 😀!"
            assert [
                c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason
            ] == ["stop"]
            assert all(chunk.usage is None for chunk in chunks[:-1])
            assert chunks[-1].choices == [] and chunks[-1].usage is not None

    run(main())


def test_completions_with_choices_and_prompts(model: Path, raw_tokenizer: Tokenizer) -> None:
    async def main() -> None:
        async with gateway_world(model) as world, client_of(world) as client:

            def answer(served: Served) -> None:
                text = f"{raw_tokenizer.decode(served.tokens)}{served.message.sampling.seed}"
                served.send(raw_tokenizer.encode(text).ids)
                served.end("length")

            world.router.answer = answer
            reply = await client.completions.create(
                model="tiny", prompt=["a", "b"], n=2, seed=7, max_tokens=20
            )
            assert [choice.text for choice in reply.choices] == ["a7", "a8", "b9", "b10"]
            assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
            assert {choice.finish_reason for choice in reply.choices} == {"length"}
            assert reply.usage is not None and reply.usage.prompt_tokens == 2
            [base] = {request_id.rpartition("-")[0] for request_id in world.router.served}
            assert sorted(world.router.served) == [f"{base}-{index}" for index in range(4)]

    run(main())


def test_streamed_choices_keep_their_index(model: Path, raw_tokenizer: Tokenizer) -> None:
    async def main() -> None:
        async with gateway_world(model) as world, client_of(world) as client:
            call = client.completions.create(model="tiny", prompt="x", n=2, stream=True)
            stream = asyncio.ensure_future(call)
            requests = [await world.router.request(), await world.router.request()]
            ids = raw_tokenizer.encode("abc").ids
            for token_id in ids:
                for served in reversed(requests):
                    served.send([token_id])
            for served in requests:
                served.end("length")
            texts = {0: "", 1: ""}
            async for chunk in await stream:
                texts[chunk.choices[0].index] += chunk.choices[0].text
            assert texts == {0: "abc", 1: "abc"}

    run(main())


def test_logprobs(model: Path, raw_tokenizer: Tokenizer) -> None:
    async def main() -> None:
        async with gateway_world(model) as world, client_of(world) as client:
            world.router.answer = saying(raw_tokenizer, "a😀")
            ids = raw_tokenizer.encode("a😀").ids
            names = ["a", *(f"bytes:\\x{byte:02x}" for byte in "😀".encode())]
            reply = await client.chat.completions.create(
                model="tiny", messages=USER, logprobs=True, top_logprobs=2
            )
            assert reply.choices[0].logprobs is not None
            content = reply.choices[0].logprobs.content or []
            assert [entry.token for entry in content] == names
            assert b"".join(bytes(entry.bytes or []) for entry in content) == "a😀".encode()
            assert [top.logprob for top in content[0].top_logprobs] == [-0.25, -2.0]

            legacy = await client.completions.create(model="tiny", prompt="x", logprobs=1)
            logprobs = legacy.choices[0].logprobs
            assert logprobs is not None
            assert logprobs.tokens == names
            assert logprobs.token_logprobs == [-0.25] * len(ids)
            assert logprobs.text_offset == [0, 1, 1, 1, 1]
            assert logprobs.top_logprobs is not None and logprobs.top_logprobs[0] == {"a": -0.25}

            stream = await client.chat.completions.create(
                model="tiny", messages=USER, logprobs=True, stream=True
            )
            entries = [
                entry
                async for chunk in stream
                if chunk.choices[0].logprobs
                for entry in chunk.choices[0].logprobs.content or []
            ]
            assert [entry.token for entry in entries] == names

    run(main())


def test_a_stop_string_ends_the_request_everywhere(model: Path, raw_tokenizer: Tokenizer) -> None:
    async def main() -> None:
        async with gateway_world(model) as world, client_of(world) as client:

            def answer(served: Served) -> None:
                served.send(raw_tokenizer.encode("one two STOP three").ids)

            world.router.answer = answer
            for stop, text in (("STOP", "one two "), (["xyz", "two"], "one ")):
                reply = await client.completions.create(model="tiny", prompt="x", stop=stop, max_tokens=50)
                assert (reply.choices[0].text, reply.choices[0].finish_reason) == (text, "stop")
                stream = await client.completions.create(
                    model="tiny", prompt="x", stop=stop, max_tokens=50, stream=True
                )
                chunks = [chunk async for chunk in stream]
                assert "".join(chunk.choices[0].text for chunk in chunks) == text
                assert chunks[-1].choices[0].finish_reason == "stop"
            for served in world.router.served.values():
                await served.cancelled.wait()
            assert sorted(world.router.cancels) == sorted(world.router.served)

    run(main())


def test_a_stopped_choice_is_cancelled_while_another_goes_on(model: Path, raw_tokenizer: Tokenizer) -> None:
    async def main() -> None:
        async with gateway_world(model) as world, client_of(world) as client:
            call = client.completions.create(model="tiny", prompt="x", n=2, stop="b")
            reply = asyncio.ensure_future(call)
            one, two = [await world.router.request(), await world.router.request()]
            one.send(raw_tokenizer.encode("abc").ids)
            await one.cancelled.wait()
            assert not two.cancelled.is_set()
            two.send(raw_tokenizer.encode("xyz").ids)
            two.end("length")
            assert [choice.text for choice in (await reply).choices] == ["a", "xyz"]

    run(main())


def test_what_the_router_is_asked(model: Path, raw_tokenizer: Tokenizer) -> None:
    async def main() -> None:
        async with gateway_world(model) as world, http_of(world) as http:
            world.router.answer = saying(raw_tokenizer, "x")
            headers = {
                "x-request-id": "mine",
                "x-microserve-strategy": "balanced",
                "x-microserve-timeout-s": "5",
            }
            body = {
                "model": "tiny",
                "prompt": [1, 2, 3],
                "max_tokens": 9,
                "temperature": 0,
                "stop_token_ids": [5],
                "cache_salt": "tenant",
            }
            reply = await http.post("/v1/completions", json=body, headers=headers)
            assert reply.headers["x-request-id"] == "mine"
            assert reply.headers["x-microserve-strategy"] == "balanced"
            assert reply.headers["x-microserve-engines"] == "e0,e1"
            assert reply.headers["x-microserve-strategy-version"] == "0"
            [served] = world.router.served.values()
            message = served.message
            assert served.tokens == [1, 2, 3]
            assert message.request_id.startswith("mine.") and message.request_id.endswith("-0")
            assert (message.model, message.strategy, message.salt) == ("tiny", "balanced", "tenant")
            assert (message.sampling.max_tokens, message.sampling.temperature) == (9, 0.0)
            assert message.sampling.stop_token_ids == (5,)
            assert 4.0 < message.ttl_s <= 5.0

    run(main())


REFUSALS = {
    "queue_full": 429,
    "cache_full": 429,
    "strategy_not_found": 404,
    "prompt_too_long": 400,
    "invalid_request": 400,
    "engine_lost": 502,
    "deadline_exceeded": 504,
    "strategy_error": 500,
    "of_a_newer_router": 500,
}


def test_a_refusal_of_the_router_has_its_status(model: Path) -> None:
    async def main() -> None:
        async with gateway_world(model) as world, http_of(world) as http:
            for code, status in REFUSALS.items():
                world.router.answer = functools.partial(
                    Served.end,
                    reason="error",
                    code=code,
                    detail="because",
                    field="a_field",
                    retry_after_s=2.5,
                )
                for stream in (False, True):
                    body = {"model": "tiny", "prompt": "x", "stream": stream}
                    reply = await http.post("/v1/completions", json=body)
                    assert reply.status_code == status
                    assert reply.json()["error"]["message"] == "because"
                    assert reply.json()["error"]["param"] == "a_field"
                    assert reply.headers.get("retry-after") == ("3" if status in (429, 503) else None)

    run(main())


def test_an_error_in_the_middle_of_a_stream(model: Path, raw_tokenizer: Tokenizer) -> None:
    async def main() -> None:
        async with gateway_world(model) as world, http_of(world) as http, client_of(world) as client:

            def answer(served: Served) -> None:
                served.send(raw_tokenizer.encode("abc").ids)
                served.end("error", code="engine_lost", detail="e0 died")

            world.router.answer = answer
            body = {"model": "tiny", "prompt": "x", "stream": True}
            reply = await http.post("/v1/completions", json=body)
            *text, last = events_of(reply.text)
            assert reply.status_code == 200
            assert "".join(event["choices"][0]["text"] for event in text) == "abc"
            assert last["error"]["code"] == "engine_lost"
            stream = await client.completions.create(model="tiny", prompt="x", stream=True)
            with pytest.raises(openai.APIError, match="e0 died"):
                async for _ in stream:
                    pass

    run(main())


def test_one_failed_choice_fails_the_request_and_cancels_the_others(model: Path) -> None:
    async def main() -> None:
        async with gateway_world(model) as world, http_of(world) as http:

            def answer(served: Served) -> None:
                if served.message.request_id.endswith("-1"):
                    served.end("error", code="cache_full", detail="full")

            world.router.answer = answer
            reply = await http.post("/v1/completions", json={"model": "tiny", "prompt": "x", "n": 3})
            assert reply.status_code == 429
            for request_id, served in world.router.served.items():
                if not request_id.endswith("-1"):
                    await served.cancelled.wait()

    run(main())


def requests_of(events: Iterable[Any]) -> list[Any]:
    return [event for event in events if event["event"] == log.REQUEST_FINISHED]


def test_the_canonical_line(model: Path, raw_tokenizer: Tokenizer) -> None:
    async def main() -> None:
        with capture_logs() as events:
            async with gateway_world(model) as world, http_of(world) as http:
                world.router.answer = saying(raw_tokenizer, "abc", cached_tokens=1)
                body = {"model": "tiny", "prompt": "xy", "n": 2}
                await http.post("/v1/completions", json=body, headers={"x-request-id": "mine"})
                await http.post("/v1/completions", json={"model": "other", "prompt": "x"})
        one, two, refused = requests_of(events)
        assert [one["index"], two["index"]] == [0, 1]
        for line in (one, two):
            assert line["http_request_id"] == "mine" and line["request_id"].startswith("mine.")
            assert (line["status"], line["code"], line["finish_reason"]) == (200, "", "stop")
            assert (line["model"], line["strategy"], line["engines"]) == ("tiny", "auto", ["e0", "e1"])
            assert (line["prompt_tokens"], line["cached_tokens"], line["output_tokens"]) == (2, 1, 4)
            assert 0 < line["ttft_s"] <= line["wall_s"]
            assert round(sum(line[f"{phase}_s"] for phase in PHASES), 6) == line["wall_s"]
        assert (refused["status"], refused["code"]) == (404, "model_not_found")
        assert refused["queued_s"] == refused["wall_s"]

    run(main())


def test_the_line_of_an_answer_that_its_strategy_has_capped(model: Path, raw_tokenizer: Tokenizer) -> None:
    async def main() -> None:
        def answer(served: Served) -> None:
            served.send(raw_tokenizer.encode("ab").ids[:2])
            served.end("length", capped_to=2)

        with capture_logs() as events:
            async with gateway_world(model) as world, http_of(world) as http:
                world.router.answer = answer
                body = {"model": "tiny", "prompt": "xy", "max_tokens": 50}
                reply = (await http.post("/v1/completions", json=body)).json()
                assert reply["choices"][0]["finish_reason"] == "length"
                assert reply["usage"]["completion_tokens"] == 2
                world.router.answer = saying(raw_tokenizer, "abc")
                await http.post("/v1/completions", json=body)
        told = [(line["strategy"], line["finish_reason"], line["capped_to"]) for line in requests_of(events)]
        assert told == [("auto", "length", 2), ("auto", "stop", 0)]

    run(main())


def test_operator_routes(model: Path, raw_tokenizer: Tokenizer) -> None:
    async def main() -> None:
        async with gateway_world(model) as world, http_of(world) as http:
            assert (await http.get("/health")).status_code == 200
            ready = (await http.get("/ready")).json()
            assert ready["ready"] and [router["router_id"] for router in ready["routers"]] == ["r0"]
            models = (await http.get("/v1/models")).json()
            assert [card["id"] for card in models["data"]] == ["tiny"]
            assert (await http.get("/v1/models/tiny")).json()["max_model_len"] == 512
            assert (await http.get("/v1/models/meta/other")).json()["error"]["code"] == "model_not_found"
            assert (await http.get("/version")).json()["version"]
            assert (await http.get("/openapi.json")).json()["openapi"] == "3.1.0"
            tokens = raw_tokenizer.encode("Hello world").ids
            said = await http.post("/tokenize", json={"prompt": "Hello world"})
            told = {"count": len(tokens), "max_model_len": 512, "tokens": tokens, "token_strs": None}
            assert said.json() == told
            assert (await http.post("/tokenize", json={"messages": USER})).json()["count"] > 2
            back = await http.post("/detokenize", json={"tokens": tokens})
            assert back.json() == {"prompt": "Hello world"}
            text = (await http.get("/metrics", params={"names": "vllm"})).text
            assert "vllm:time_to_first_token_seconds_bucket" in text

    run(main())
