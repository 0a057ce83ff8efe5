"""A deadline ends an answer with what there is of it; only who has nothing yet is told of the time."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest
from structlog.testing import capture_logs
from tokenizers import Tokenizer

from microserve.gateway.generation import group
from microserve.protocol import log
from tests.support.gateway.gateway_world import GatewayWorld, Served, gateway_world, run, special_id

LATE = {"code": "deadline_exceeded", "detail": "too late"}


async def ask(world: GatewayWorld, *, timeout_s: float = 30.0, **fields: object) -> httpx.Response:
    async with httpx.AsyncClient(base_url=world.address, timeout=20.0) as http:
        body = {"model": "tiny", "prompt": "x", "max_tokens": 50, **fields}
        headers = {"x-microserve-timeout-s": str(timeout_s)}
        return await http.post("/v1/completions", json=body, headers=headers)


def texts_of(reply: httpx.Response) -> list[tuple[str, str]]:
    """Text and reason of each choice, streamed or not."""
    assert reply.status_code == 200, reply.text
    if not reply.headers["content-type"].startswith("text/event-stream"):
        return [(choice["text"], choice["finish_reason"]) for choice in reply.json()["choices"]]
    assert reply.text.endswith("data: [DONE]\n\n")
    texts: dict[int, str] = {}
    reasons: dict[int, str] = {}
    for line in reply.text.split("\n\n")[:-2]:
        for choice in json.loads(line.removeprefix("data: "))["choices"]:
            texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
            reasons[choice["index"]] = choice["finish_reason"] or ""
    return [(texts[index], reasons[index]) for index in sorted(texts)]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("who", ["router", "gateway"])
def test_what_there_is_at_the_deadline_is_the_answer(
    model: Path, raw_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, stream: bool, who: str
) -> None:
    monkeypatch.setattr(group, "DEADLINE_GRACE_S", 0.0)
    # The first byte of an emoji, at the end: half a character is shown as what it is.
    ids = [*raw_tokenizer.encode("one two").ids, raw_tokenizer.encode("😀").ids[0]]

    def answer(served: Served) -> None:
        served.send(ids)
        if who == "router":
            served.end("error", **LATE)

    async def main() -> None:
        async with gateway_world(model) as world:
            world.router.answer = answer
            with capture_logs() as events:
                reply = await ask(world, timeout_s=30.0 if who == "router" else 0.3, stream=stream, stop="zz")
            assert texts_of(reply) == [("one two\N{REPLACEMENT CHARACTER}", "length")]
            [line] = [event for event in events if event["event"] == log.REQUEST_FINISHED]
            assert (line["status"], line["finish_reason"], line["output_tokens"]) == (200, "length", len(ids))
            if who == "gateway":
                [served] = world.router.served.values()
                await served.cancelled.wait()
            if not stream:
                assert reply.json()["usage"]["completion_tokens"] == len(ids)

    run(main())


def test_a_choice_without_a_token_is_empty_beside_one_that_has_some(
    model: Path, raw_tokenizer: Tokenizer
) -> None:
    def answer(served: Served) -> None:
        if served.message.request_id.endswith("-1"):
            served.send(raw_tokenizer.encode("abc").ids)
            for each in served.router.served.values():
                each.end("error", **LATE)

    async def main() -> None:
        async with gateway_world(model) as world:
            world.router.answer = answer
            assert texts_of(await ask(world, n=2)) == [("", "length"), ("abc", "length")]

    run(main())


def test_a_stop_token_whose_end_is_not_told_in_time_is_still_the_end(
    model: Path, raw_tokenizer: Tokenizer
) -> None:
    stop = special_id(raw_tokenizer, "<|im_end|>")

    def answer(served: Served) -> None:
        served.send([*raw_tokenizer.encode("abc").ids, stop])
        served.end("error", **LATE)

    async def main() -> None:
        async with gateway_world(model) as world:
            world.router.answer = answer
            assert texts_of(await ask(world, stop_token_ids=[stop])) == [("abc", "stop")]

    run(main())


@pytest.mark.parametrize("stream", [False, True])
def test_without_a_token_it_is_504(model: Path, stream: bool) -> None:
    async def main() -> None:
        async with gateway_world(model) as world:
            world.router.answer = lambda served: served.end("error", **LATE)
            reply = await ask(world, stream=stream)
            assert (reply.status_code, reply.json()["error"]["code"]) == (504, "deadline_exceeded")

    run(main())


def test_other_failures_are_failures_still(model: Path, raw_tokenizer: Tokenizer) -> None:
    def answer(served: Served) -> None:
        served.send(raw_tokenizer.encode("abc").ids)
        served.end("error", code="engine_lost", detail="e0 died")

    async def main() -> None:
        async with gateway_world(model) as world:
            world.router.answer = answer
            assert (await ask(world)).status_code == 502

    run(main())
