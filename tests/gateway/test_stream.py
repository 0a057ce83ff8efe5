"""Streams to the byte: their form, their merging, and what a slow or silent client costs."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from gateway_world import gateway_world, post, read_chunk, read_head, run
from tokenizers import Tokenizer

from microserve.gateway import sse
from microserve.protocol.actions import TokenLogprob


def test_exact_bytes_of_a_chat_stream(model: Path, raw_tokenizer: Tokenizer) -> None:
    async def main() -> None:
        async with gateway_world(model) as world:
            reader, writer = await post(
                world,
                "/v1/chat/completions",
                messages=[{"role": "user", "content": "hi"}],
                stream=True,
                stream_options={"include_usage": True},
            )
            served = await world.router.request()
            [a], [quote] = raw_tokenizer.encode("a").ids, raw_tokenizer.encode('"').ids
            served.send([a])
            status, headers = await read_head(reader)
            assert status == 200
            assert headers["content-type"] == "text/event-stream; charset=utf-8"
            assert headers["cache-control"] == "no-cache"
            assert headers["x-accel-buffering"] == "no"
            assert "content-length" not in headers

            first = await read_chunk(reader)
            opening, delta, rest = first.split(b"\n\n")
            assert rest == b""
            start = json.loads(opening.removeprefix(b"data: "))
            head = (
                b'data: {"id":"%b","object":"chat.completion.chunk","created":%d,"model":"tiny",'
                b'"system_fingerprint":"%b","choices":['
                % (start["id"].encode(), start["created"], start["system_fingerprint"].encode())
            )
            tail = b'],"usage":null}'
            assert (
                opening
                == head
                + (
                    b'{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}'
                )
                + tail
            )
            assert delta == head + (
                b'{"index":0,"delta":{"content":"a"},"logprobs":null,"finish_reason":null}' + tail
            )
            served.send([quote])
            assert await read_chunk(reader) == head + (
                b'{"index":0,"delta":{"content":"\\""},"logprobs":null,"finish_reason":null}' + tail + b"\n\n"
            )
            served.end("length", cached_tokens=3)
            assert await read_chunk(reader) == head + (
                b'{"index":0,"delta":{},"logprobs":null,"finish_reason":"length"}' + tail + b"\n\n"
            )
            prompt = len(served.tokens)
            assert await read_chunk(reader) == head + (
                b'],"usage":{"prompt_tokens":%d,"completion_tokens":2,"total_tokens":%d,'
                b'"prompt_tokens_details":{"cached_tokens":3}}}\n\ndata: [DONE]\n\n' % (prompt, prompt + 2)
            )
            assert await read_chunk(reader) == b""
            writer.close()

    run(main())


def test_exact_bytes_of_a_completion_stream_that_breaks(model: Path, raw_tokenizer: Tokenizer) -> None:
    async def main() -> None:
        async with gateway_world(model) as world:
            reader, writer = await post(world, "/v1/completions", prompt="x", stream=True)
            served = await world.router.request()
            served.send(raw_tokenizer.encode("a").ids)
            await read_head(reader)
            chunk = await read_chunk(reader)
            assert chunk.endswith(
                b'"choices":[{"index":0,"text":"a","logprobs":null,"finish_reason":null}]}\n\n'
            )
            served.end("error", code="engine_lost", detail="gone")
            assert await read_chunk(reader) == (
                b'data: {"error":{"message":"gone","type":"server_error","param":null,"code":"engine_lost"}}\n\n'
            )
            assert await read_chunk(reader) == b""
            writer.close()

    run(main())


def test_a_character_cut_between_messages_comes_whole(model: Path, raw_tokenizer: Tokenizer) -> None:
    async def main() -> None:
        async with gateway_world(model) as world:
            reader, writer = await post(world, "/v1/completions", prompt="x", stream=True)
            served = await world.router.request()
            ids = raw_tokenizer.encode("é😀").ids
            assert len(ids) == 6
            for token_id in ids:
                served.send([token_id])
            served.end("length")
            await read_head(reader)
            text = ""
            while (chunk := await read_chunk(reader)) and b"[DONE]" not in chunk:
                for line in chunk.split(b"\n\n")[:-1]:
                    text += json.loads(line.removeprefix(b"data: "))["choices"][0]["text"]
                    assert "\N{REPLACEMENT CHARACTER}" not in text
            assert text == "é😀"
            writer.close()

    run(main())


def logprobs_of(token_id: int) -> TokenLogprob:
    """Many bytes for one token, so that a stream soon fills every buffer on its way."""
    return TokenLogprob(-1.0, [(token_id, -1.0)] * 20)


def test_a_slow_reader_gets_fewer_and_larger_events_and_holds_up_nobody(
    model: Path, raw_tokenizer: Tokenizer
) -> None:
    """The first client does not read; the second gets its answer meanwhile; then the first gets all of it."""

    async def main() -> None:
        num_tokens = 1500
        async with gateway_world(model, "bus.credit=4", max_model_len=2 * num_tokens) as world:
            slow_reader, slow_writer = await post(
                world, "/v1/completions", prompt="x", stream=True, max_tokens=num_tokens, logprobs=20
            )
            slow_writer.transport.pause_reading()  # type: ignore[attr-defined]
            slow = await world.router.request()
            [a] = raw_tokenizer.encode("a").ids
            for _ in range(num_tokens):
                slow.send([a], logprobs=[logprobs_of(a)])
            slow.end("length")

            reader, writer = await post(world, "/v1/completions", prompt="x")
            quick = await world.router.request()
            quick.send([a])
            quick.end("length")
            status, _ = await read_head(reader)
            assert status == 200
            writer.close()

            slow_writer.transport.resume_reading()  # type: ignore[attr-defined]
            await read_head(slow_reader)
            texts: list[str] = []
            while chunk := await read_chunk(slow_reader):
                lines = [line for line in chunk.split(b"\n\n") if line and b"[DONE]" not in line]
                texts += [json.loads(line.removeprefix(b"data: "))["choices"][0]["text"] for line in lines]
            assert "".join(texts) == "a" * num_tokens
            assert max(map(len, texts)) > 100
            slow_writer.close()

    run(main())


def test_a_client_that_stops_reading_is_given_up(
    model: Path, raw_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sse, "STALL_S", 0.2)

    async def main() -> None:
        num_tokens = 1500
        async with gateway_world(model, max_model_len=2 * num_tokens) as world:
            reader, writer = await post(
                world, "/v1/completions", prompt="x", stream=True, max_tokens=num_tokens, logprobs=20
            )
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            served = await world.router.request()
            [a] = raw_tokenizer.encode("a").ids
            for _ in range(num_tokens - 1):
                served.send([a], logprobs=[logprobs_of(a)])
            await served.cancelled.wait()
            # The connection is dropped with what was still buffered, not flushed to a client that never reads.
            writer.transport.resume_reading()  # type: ignore[attr-defined]
            with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
                await reader.readexactly(1 << 30)
            writer.close()

    run(main())


def test_a_waiting_stream_is_pinged(
    model: Path, raw_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sse, "PING_S", 0.05)

    async def main() -> None:
        async with gateway_world(model) as world:
            reader, writer = await post(world, "/v1/completions", prompt="x", stream=True)
            served = await world.router.request()
            status, _ = await read_head(reader)
            assert status == 200
            assert await read_chunk(reader) == b": ping\n\n"
            served.send(raw_tokenizer.encode("a").ids)
            served.end("length")
            rest = b""
            while chunk := await read_chunk(reader):
                rest += chunk
            assert b'"text":"a"' in rest and rest.endswith(b"data: [DONE]\n\n")
            writer.close()

    run(main())
