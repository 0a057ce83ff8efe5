"""Streams to the byte: their form, their merging, and what a slow or silent client costs."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from microserve.gateway.http import sse
from microserve.protocol.messages.engine import TokenLogprob
from tests.support.gateway.gateway_world import gateway_world, post, run


def test_exact_bytes_of_a_chat_stream(model: Path, raw_tokenizer: Tokenizer) -> None:
    async def main() -> None:
        body = {
            "messages": [{"role": "user", "content": "hi"}],
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        async with gateway_world(model) as world, post(world, "/v1/chat/completions", **body) as client:
            served = await world.router.request()
            [a], [quote] = raw_tokenizer.encode("a").ids, raw_tokenizer.encode('"').ids
            served.send([a])
            status, headers = await client.head()
            assert status == 200
            assert headers["content-type"] == "text/event-stream; charset=utf-8"
            assert headers["cache-control"] == "no-cache"
            assert headers["x-accel-buffering"] == "no"
            assert "content-length" not in headers

            opening, delta, rest = (await client.chunk()).split(b"\n\n")
            assert rest == b""
            start = json.loads(opening.removeprefix(b"data: "))
            head = (
                b'data: {"id":"%b","object":"chat.completion.chunk","created":%d,"model":"tiny",'
                b'"system_fingerprint":"%b","choices":['
                % (start["id"].encode(), start["created"], start["system_fingerprint"].encode())
            )

            def chunk(choice: bytes) -> bytes:
                return head + b'{"index":0,' + choice + b'}],"usage":null}'

            none = b'"logprobs":null,"finish_reason":null'
            assert opening == chunk(b'"delta":{"role":"assistant","content":""},' + none)
            assert delta == chunk(b'"delta":{"content":"a"},' + none)
            served.send([quote])
            assert await client.chunk() == chunk(b'"delta":{"content":"\\""},' + none) + b"\n\n"
            served.end("length", cached_tokens=3)
            end = chunk(b'"delta":{},"logprobs":null,"finish_reason":"length"')
            assert await client.chunk() == end[:-1] + b',"microserve":{"exact":"none"}}\n\n'
            prompt = len(served.tokens)
            assert await client.chunk() == head + (
                b'],"usage":{"prompt_tokens":%d,"completion_tokens":2,"total_tokens":%d,'
                b'"prompt_tokens_details":{"cached_tokens":3}}}\n\ndata: [DONE]\n\n' % (prompt, prompt + 2)
            )
            assert await client.chunk() == b""

    run(main())


def test_all_choices_of_a_stream_are_there_in_order_before_one_says_something(
    model: Path, raw_tokenizer: Tokenizer
) -> None:
    """OpenAI's client puts the first chunk at its index of a list that it has just made of that chunk."""

    async def main() -> None:
        body = {"messages": [{"role": "user", "content": "hi"}], "stream": True, "n": 3}
        async with gateway_world(model) as world, post(world, "/v1/chat/completions", **body) as client:
            asked = [await world.router.request() for _ in range(3)]
            for each in (asked[2], asked[1]):
                each.send(raw_tokenizer.encode("a").ids)
                each.end("length")
            await client.head()
            told = await client.chunk()
            asked[0].end("length")
            while part := await client.chunk():
                told += part
            chunks = [json.loads(line.removeprefix(b"data: ")) for line in told.split(b"\n\n")[:-2]]
            choices = [choice for chunk in chunks for choice in chunk["choices"]]
            opened = [choice["index"] for choice in choices if "role" in choice["delta"]]
            assert opened == [0, 1, 2] == [choice["index"] for choice in choices[:3]]
            assert all(choice["delta"] == {"role": "assistant", "content": ""} for choice in choices[:3])

    run(main())


def test_exact_bytes_of_a_completion_stream_that_breaks(model: Path, raw_tokenizer: Tokenizer) -> None:
    async def main() -> None:
        async with (
            gateway_world(model) as world,
            post(world, "/v1/completions", prompt="x", stream=True) as client,
        ):
            served = await world.router.request()
            served.send(raw_tokenizer.encode("a").ids)
            await client.head()
            assert (await client.chunk()).endswith(
                b'"choices":[{"index":0,"text":"a","logprobs":null,"finish_reason":null}]}\n\n'
            )
            served.end("error", code="engine_lost", detail="gone")
            assert await client.chunk() == (
                b'data: {"error":{"message":"gone","type":"server_error","param":null,'
                b'"code":"engine_lost"}}\n\n'
            )
            assert await client.chunk() == b""

    run(main())


def test_a_character_cut_between_messages_comes_whole(model: Path, raw_tokenizer: Tokenizer) -> None:
    async def main() -> None:
        async with (
            gateway_world(model) as world,
            post(world, "/v1/completions", prompt="x", stream=True) as client,
        ):
            served = await world.router.request()
            ids = raw_tokenizer.encode("é😀").ids
            assert len(ids) == 6
            for token_id in ids:
                served.send([token_id])
            served.end("length")
            await client.head()
            texts = [event["choices"][0]["text"] for event in (await client.events())[:-1]]
            assert "".join(texts) == "é😀"
            assert set(texts) <= {"é", "😀", "é😀", ""}

    run(main())


def logprobs_of(token_id: int) -> TokenLogprob:
    """Kilobytes for one token, so that a stream soon fills every buffer on its way."""
    return TokenLogprob(-1.0, [(token_id, -1.0)] * 20)


def big_body(num_tokens: int) -> dict[str, object]:
    return {
        "messages": [{"role": "user", "content": "hi"}],
        "stream": True,
        "max_tokens": num_tokens,
        "logprobs": True,
        "top_logprobs": 20,
    }


@pytest.mark.slow
def test_a_slow_reader_gets_fewer_and_larger_events_and_holds_up_nobody(
    model: Path, raw_tokenizer: Tokenizer
) -> None:
    """The first client does not read; the second gets its answer meanwhile; then the first gets all of it."""

    async def main() -> None:
        num_tokens = 3000
        async with (
            gateway_world(model, "bus.credit=4", max_model_len=2 * num_tokens) as world,
            post(world, "/v1/chat/completions", **big_body(num_tokens)) as slow,
        ):
            slow.stop_reading()
            served = await world.router.request()
            [a] = raw_tokenizer.encode("a").ids
            for _ in range(num_tokens):
                served.send([a], logprobs=[logprobs_of(a)])
            served.end("length")

            async with post(world, "/v1/completions", prompt="x") as quick:
                other = await world.router.request()
                other.send([a])
                other.end("length")
                assert (await quick.head())[0] == 200

            slow.go_on_reading()
            await slow.head()
            deltas = [event["choices"][0]["delta"] for event in (await slow.events())[:-1]]
            texts = [delta.get("content", "") for delta in deltas]
            assert "".join(texts) == "a" * num_tokens
            assert max(map(len, texts)) > 100

    run(main())


@pytest.mark.slow
def test_a_client_that_stops_reading_is_given_up(
    model: Path, raw_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sse, "STALL_S", 0.2)

    async def main() -> None:
        num_tokens = 3000
        async with (
            gateway_world(model, max_model_len=2 * num_tokens) as world,
            post(world, "/v1/chat/completions", **big_body(num_tokens)) as client,
        ):
            client.stop_reading()
            served = await world.router.request()
            [a] = raw_tokenizer.encode("a").ids
            for _ in range(num_tokens - 1):
                served.send([a], logprobs=[logprobs_of(a)])
            await served.cancelled.wait()
            # Dropped with what was still buffered, not flushed to a client that never reads.
            client.go_on_reading()
            with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
                await client.reader.readexactly(1 << 30)

    run(main())


def test_a_waiting_stream_is_pinged(
    model: Path, raw_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sse, "PING_S", 0.05)

    async def main() -> None:
        async with (
            gateway_world(model) as world,
            post(world, "/v1/completions", prompt="x", stream=True) as client,
        ):
            served = await world.router.request()
            assert (await client.head())[0] == 200
            assert await client.chunk() == b": ping\n\n"
            served.send(raw_tokenizer.encode("a").ids)
            served.end("length")
            rest = b""
            while chunk := await client.chunk():
                rest += chunk
            assert b'"text":"a"' in rest and rest.endswith(b"data: [DONE]\n\n")

    run(main())
