"""What a token is, as clients see it: its share of the text, and never the text of the one that ends it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from tokenizers import Tokenizer

from microserve.protocol.messages.engine import TokenLogprob
from tests.support.gateway.gateway_world import GatewayWorld, Served, gateway_world, run, special_id
from tests.support.gateway.tokenizers import byte_fallback, byte_ids, ids_of


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer of Llama 2's kind."""
    directory = tmp_path_factory.mktemp("llama")
    byte_fallback().save(str(directory / "tokenizer.json"))
    return directory


async def complete(world: GatewayWorld, **body: Any) -> dict[str, Any]:
    async with httpx.AsyncClient(base_url=world.address, timeout=20.0) as http:
        reply = await http.post("/v1/completions", json={"model": "tiny", "prompt": "x", **body})
        assert reply.status_code == 200, reply.text
        answer: dict[str, Any] = reply.json()
        return answer


async def streamed(world: GatewayWorld, **body: Any) -> list[dict[str, Any]]:
    async with httpx.AsyncClient(base_url=world.address, timeout=20.0) as http:
        reply = await http.post("/v1/completions", json={"model": "tiny", "stream": True, **body})
        lines = [line.removeprefix("data: ") for line in reply.text.split("\n\n") if line]
        assert lines.pop() == "[DONE]"
        return [json.loads(line)["choices"][0] for line in lines]


def test_logprobs_of_a_sentencepiece_model(llama: Path) -> None:
    raw = byte_fallback()
    prompt = [*ids_of(raw, ["<s>", "▁he"]), *byte_ids(raw, "😀😀")]
    ids = [*ids_of(raw, ["▁the", "▁mesh"]), *byte_ids(raw, "漢"), *ids_of(raw, ["!"])]
    names = [" the", " mesh", r"bytes:\xe6", r"bytes:\xbc", r"bytes:\xa2", "!"]

    def say(served: Served) -> None:
        for each in ids:
            logprobs = (
                [] if served.message.sampling.logprobs is None else [TokenLogprob(-1.0, [(each, -1.0)])]
            )
            served.send([each], logprobs=logprobs)
        served.end()

    async def main() -> None:
        async with gateway_world(llama) as world:
            world.router.answer = say
            plain = await complete(world, prompt=prompt)
            assert plain["choices"][0]["text"] == " the mesh漢!"
            choice = (await complete(world, prompt=prompt, logprobs=1))["choices"][0]
            logprobs = choice["logprobs"]
            assert (choice["text"], logprobs["tokens"]) == (" the mesh漢!", names)
            assert logprobs["text_offset"] == [0, 4, 9, 9, 9, 10]
            assert logprobs["top_logprobs"] == [{name: -1.0} for name in names]
            chunks = [each for each in await streamed(world, prompt=prompt, logprobs=1) if each["logprobs"]]
            assert "".join(each["text"] for each in chunks) == " the mesh漢!"
            assert [name for each in chunks for name in each["logprobs"]["tokens"]] == names

    run(main())


@pytest.mark.parametrize("by", ["stop_token_ids", "eos"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_token_from_one_engine_and_the_end_from_another(
    model: Path, raw_tokenizer: Tokenizer, by: str, stream: bool
) -> None:
    """D4, in the order in which it happens: the token is handed on long before ``Ended`` names it."""
    [stop] = raw_tokenizer.encode("b").ids
    body: dict[str, Any] = {"stop_token_ids": [stop]} if by == "stop_token_ids" else {}

    async def main() -> None:
        eos = [stop, 77] if by == "eos" else []
        async with gateway_world(model, eos_token_ids=eos) as world:
            asking: asyncio.Future[Any] = asyncio.ensure_future(
                streamed(world, prompt="x", **body) if stream else complete(world, **body)
            )
            served = await world.router.request()
            served.send(raw_tokenizer.encode("a").ids)
            served.send([stop])
            await asyncio.sleep(0.05)
            served.end("stop", stop_token_id=stop)
            answer = await asking
            chunks = answer if isinstance(answer, list) else answer["choices"]
            assert "".join(chunk["text"] for chunk in chunks) == "a"
            assert chunks[-1]["finish_reason"] == "stop"

    run(main())


def test_a_stop_token_that_was_the_last_word_of_a_lost_router(model: Path, raw_tokenizer: Tokenizer) -> None:
    """The next router answers with the end alone."""
    [stop] = raw_tokenizer.encode("b").ids

    async def main() -> None:
        async with gateway_world(model, num_routers=2, eos_token_ids=[stop]) as world:
            asking = asyncio.ensure_future(complete(world))
            first, second = [asyncio.ensure_future(router.request()) for router in world.routers]
            await asyncio.wait([first, second], return_when=asyncio.FIRST_COMPLETED)
            served = (first if first.done() else second).result()
            served.send([*raw_tokenizer.encode("a").ids, stop])
            served.end("error", code="draining", detail="the router stops")
            moved = await (second if served.router is world.routers[0] else first)
            assert moved.message.num_output_tokens == 2
            moved.send(offset=2, ended=moved.ended("stop", stop_token_id=stop))
            assert (await asking)["choices"][0]["text"] == "a"

    run(main())


def test_an_end_that_is_special_is_no_text_however_it_ends(model: Path, raw_tokenizer: Tokenizer) -> None:
    end = special_id(raw_tokenizer, "<|im_end|>")

    async def main() -> None:
        async with gateway_world(model, eos_token_ids=[end]) as world:
            world.router.answer = lambda served: served.send(
                [*raw_tokenizer.encode("a").ids, end], ended=served.ended("length")
            )
            assert (await complete(world))["choices"][0]["text"] == "a"
            assert (await complete(world, ignore_eos=True))["choices"][0]["text"] == "a"

    run(main())
