"""Many clients, idle clients, clients that do not read, and one enormous prompt: memory is bounded and nobody
else notices. On real sockets; what each costs is printed.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import resource
import socket
import sys
import threading
import time
import tracemalloc
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from pathlib import Path

import httpx
import pytest
from tokenizers import Tokenizer

from microserve.gateway import server
from microserve.gateway.http import sse
from microserve.gateway.text.tokenizer import ModelTokenizer
from microserve.protocol.messages.engine import TokenLogprob
from tests.support.gateway.gateway_world import GatewayWorld, Served, connect, gateway_world, post, run

pytestmark = pytest.mark.slow

NUM_IDLE = int(os.environ.get("MICROSERVE_TEST_STREAMS", "10000"))
"""Idle streams; fewer where the machine does not allow so many files in one process."""
MAX_IDLE_NBYTES = 64 << 10
"""Of one idle stream, in the process of the gateway (and of the router that the test plays)."""
SPARE_FILES = 300

IDLE_CLIENTS = """
import socket, sys
port, count = int(sys.argv[1]), int(sys.argv[2])
body = b'{"model": "tiny", "prompt": "x", "stream": true, "max_tokens": 4}'
head = b"POST /v1/completions HTTP/1.0\\r\\nhost: t\\r\\ncontent-length: %d\\r\\n\\r\\n"
clients = []
for _ in range(count):
    client = socket.create_connection(("127.0.0.1", port))
    client.sendall(head % len(body) + body)
    clients.append(client)
print("sent", flush=True)
whole = 0
for client in clients:
    answer = b""
    while data := client.recv(65536):
        answer += data
    whole += answer.startswith(b"HTTP/1.1 200") and b"data: [DONE]" in answer
    client.close()
print(whole, flush=True)
"""
"""Another process: each end of a connection needs a file of its own, and clients must not count here."""


def rss_nbytes() -> int:
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@contextmanager
def traced_memory() -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
    finally:
        tracemalloc.stop()


@contextmanager
def as_many_files_as_allowed() -> Iterator[int]:
    """Raise the soft limit of open files; how many more may be opened."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        yield hard - len(os.listdir("/proc/self/fd")) - SPARE_FILES
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@asynccontextmanager
async def idle_clients(world: GatewayWorld, count: int) -> AsyncIterator[asyncio.subprocess.Process]:
    """A process with so many streams open, which reads them to their end."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", IDLE_CLIENTS, str(world.port), str(count)), stdout=asyncio.subprocess.PIPE
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def one_line(process: asyncio.subprocess.Process) -> bytes:
    assert process.stdout is not None
    return (await process.stdout.readline()).strip()


async def ask(world: GatewayWorld, token_ids: list[int]) -> float:
    """One small request beside whatever is going on; seconds."""
    began = time.perf_counter()
    async with post(world, "/v1/completions", prompt="quick", stream=True) as client:
        while (served := await world.router.request()).message.sampling.max_tokens == 4:
            pass  # one of the crowd's
        served.send(token_ids)
        served.end("length")
        assert (await client.head())[0] == 200
        assert (await client.events())[-1] == "[DONE]"
    return time.perf_counter() - began


@pytest.mark.heavy
def test_ten_thousand_idle_streams(model: Path, raw_tokenizer: Tokenizer) -> None:
    token_ids = raw_tokenizer.encode("ab").ids

    async def main() -> None:
        with as_many_files_as_allowed() as num_files:
            count = min(NUM_IDLE, num_files)
            async with gateway_world(model) as world:
                quiet_s = await ask(world, token_ids)
                gc.collect()
                before = rss_nbytes()
                async with idle_clients(world, count) as clients:
                    crowd = [await world.router.request() for _ in range(count)]
                    assert await one_line(clients) == b"sent"
                    each = (rss_nbytes() - before) / count
                    beside_s = await ask(world, token_ids)
                    print(
                        f"{count} idle streams, {each / 1024:.1f} KiB each; "
                        f"a request beside them {1e3 * beside_s:.0f} ms, alone {1e3 * quiet_s:.0f} ms"
                    )
                    assert each < MAX_IDLE_NBYTES
                    for served in crowd:
                        served.send(token_ids)
                        served.end("length")
                    assert int(await one_line(clients)) == count
                assert world.router.cancels == []

    run(main(), timeout_s=120.0)


async def nothing_runs(world: GatewayWorld) -> None:
    """Wait until the gateway is done with every request: the router hears of the end of one before that."""
    async with httpx.AsyncClient(base_url=world.address) as http:
        while 'microserve_requests_running{model_name="tiny"} 0.0' not in (await http.get("/metrics")).text:
            pass


# --- clients that do not read ------------------------------------------------------------------------

NUM_STALLED, NUM_READING = 24, 8
STALLED_TOKENS, READING_TOKENS = 300, 30
STALL_S = 2.0
MAX_STALLED_NBYTES = 1 << 20
"""Of one reader that stopped: its tokens with 20 alternatives each, and full buffers."""


@contextmanager
def unread(world: GatewayWorld) -> Iterator[socket.socket]:
    """A stream with kilobytes a token that its client never reads."""
    messages = [{"role": "user", "content": "hi"}]
    body = {"model": "tiny", "messages": messages, "stream": True, "max_tokens": STALLED_TOKENS}
    content = json.dumps(body | {"logprobs": True, "top_logprobs": 20}).encode()
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", world.port))
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: t\r\ncontent-length: {len(content)}\r\n\r\n"
        client.sendall(head.encode() + content)
        yield client


def test_readers_that_stop_are_cut_and_hold_up_nobody(
    model: Path, raw_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sse, "STALL_S", STALL_S)
    [a] = raw_tokenizer.encode("a").ids
    kilobytes = TokenLogprob(-1.0, [(token_id, -1.0) for token_id in range(20)])

    async def read(world: GatewayWorld) -> str:
        async with post(
            world, "/v1/completions", prompt="x", stream=True, max_tokens=READING_TOKENS
        ) as client:
            await client.head()
            events = await client.events()
        return "".join(event["choices"][0]["text"] for event in events[:-1])

    async def main() -> None:
        async with gateway_world(model, max_model_len=2 * STALLED_TOKENS) as world:
            await asyncio.gather(read(world), answer(world))
            gc.collect()
            before, _ = tracemalloc.get_traced_memory()
            tracemalloc.reset_peak()
            with ExitStack() as clients:
                for _ in range(NUM_STALLED):
                    clients.enter_context(unread(world))
                stalled = [await world.router.request() for _ in range(NUM_STALLED)]
                readers = [asyncio.ensure_future(read(world)) for _ in range(NUM_READING)]
                reading = [await world.router.request() for _ in readers]
                # All of the stalled ones' tokens are on their way before the first of the others' last.
                for step in range(STALLED_TOKENS):
                    for served in stalled:
                        served.send([a], logprobs=[kilobytes])
                    if step % 20 == 0:
                        for served in reading:
                            if served.sent < READING_TOKENS:
                                served.send([a])
                        await asyncio.sleep(0)
                for served in reading:
                    while served.sent < READING_TOKENS:
                        served.send([a])
                    served.end("length")
                texts = await asyncio.gather(*readers)
                assert texts == ["a" * READING_TOKENS] * NUM_READING
                most = tracemalloc.get_traced_memory()[1] - before
                for served in stalled:
                    await served.cancelled.wait()
                given_up = {served.message.request_id for served in stalled}
            await nothing_runs(world)
            world.router.served.clear()
            stalled.clear()
            gc.collect()
            left = tracemalloc.get_traced_memory()[0] - before
            print(
                f"{NUM_STALLED} stalled readers: {most / NUM_STALLED / 1024:.0f} KiB each at most, "
                f"{left / NUM_STALLED / 1024:.0f} KiB each when they had been cut"
            )
            assert most < NUM_STALLED * MAX_STALLED_NBYTES
            assert left < NUM_STALLED * MAX_IDLE_NBYTES
            assert set(world.router.cancels) == given_up

    async def answer(world: GatewayWorld) -> None:
        served = await world.router.request()
        served.send([a] * READING_TOKENS)
        served.end("length")

    with traced_memory():
        run(main(), timeout_s=90.0)


# --- one enormous prompt -----------------------------------------------------------------------------

LONG_TOKENS = 100_000
LONG_PROMPTS: dict[str, object] = {
    "ids": [number % 300 for number in range(LONG_TOKENS)],
    "text": "the quick brown fox jumps over the lazy dog " * 23_000,
}
NUM_ROUNDS = 4
MAX_GROWTH_NBYTES = 4 << 20
"""Of Python's memory from the first such prompt to the last: less than the ids of one."""
MAX_RSS_GROWTH_NBYTES = 192 << 20
"""Of everything: the tokenizer's threads keep arenas of their own, which stop growing after a few prompts."""


@pytest.mark.parametrize("kind", LONG_PROMPTS)
def test_an_enormous_prompt_is_served_beside_small_ones(
    model: Path, raw_tokenizer: Tokenizer, kind: str
) -> None:
    token_ids = raw_tokenizer.encode("ab").ids

    async def main() -> None:
        async with (
            gateway_world(model, max_model_len=2_000_000) as world,
            httpx.AsyncClient(base_url=world.address, timeout=60.0) as http,
        ):
            lengths: list[int] = []

            def answer(served: Served) -> None:
                lengths.append(len(served.tokens))
                served.send(token_ids)
                served.end("length")

            world.router.answer = answer
            body = json.dumps({"model": "tiny", "prompt": LONG_PROMPTS[kind], "max_tokens": 2}).encode()
            small_s: list[float] = []
            long_s: list[float] = []
            traced: list[int] = []
            before = rss_nbytes()
            for _ in range(NUM_ROUNDS):
                began = time.perf_counter()
                long = asyncio.ensure_future(http.post("/v1/completions", content=body))
                while not long.done():
                    asked = time.perf_counter()
                    small = await http.post("/v1/completions", json={"model": "tiny", "prompt": "x"})
                    assert small.status_code == 200
                    small_s.append(time.perf_counter() - asked)
                reply = await long
                assert reply.status_code == 200
                assert reply.json()["usage"]["prompt_tokens"] == max(lengths) >= LONG_TOKENS
                long_s.append(time.perf_counter() - began)
                world.router.served.clear()
                gc.collect()
                traced.append(tracemalloc.get_traced_memory()[0])
            print(
                f"{max(lengths)} tokens as {kind}: {min(long_s):.2f} to {max(long_s):.2f} s; "
                f"{len(small_s)} small ones beside, slowest {1e3 * max(small_s):.0f} ms; after {NUM_ROUNDS} "
                f"{(traced[-1] - traced[0]) >> 10} KiB more, process {(rss_nbytes() - before) >> 20} MiB more"
            )
            assert len(small_s) > NUM_ROUNDS
            assert traced[-1] - traced[0] < MAX_GROWTH_NBYTES
            assert rss_nbytes() - before < MAX_RSS_GROWTH_NBYTES

    with traced_memory():
        run(main(), timeout_s=120.0)


def test_streams_of_enormous_prompts_do_not_keep_them(model: Path, raw_tokenizer: Tokenizer) -> None:
    """What a stream holds while it waits for its tokens does not grow with its prompt."""
    count = 10
    token_ids = raw_tokenizer.encode("ab").ids
    body = {"model": "tiny", "prompt": LONG_PROMPTS["ids"], "stream": True, "max_tokens": 2}
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: t\r\ncontent-length: {len(content)}\r\n\r\n".encode()

    async def main() -> None:
        async with gateway_world(model, max_model_len=2_000_000) as world, AsyncExitStack() as clients:
            await ask(world, token_ids)
            gc.collect()
            before, _ = tracemalloc.get_traced_memory()
            waiting, streams = [], []
            for _ in range(count):
                streams.append(await clients.enter_async_context(connect(world)))
                await streams[-1].send(head)
                await streams[-1].send(content)
                waiting.append(await world.router.request())
                waiting[-1].tokens.clear()  # the test's own copy
            gc.collect()
            each = (tracemalloc.get_traced_memory()[0] - before) / count
            print(f"{each / 1024:.0f} KiB for a stream whose prompt has {LONG_TOKENS} tokens")
            assert each < MAX_IDLE_NBYTES
            for served, stream in zip(waiting, streams, strict=True):
                served.send(token_ids)
                served.end("length")
                await stream.head()
                assert (await stream.events())[-1] == "[DONE]"

    with traced_memory():
        run(main(), timeout_s=120.0)


@pytest.mark.parametrize("kind", LONG_PROMPTS)
def test_an_enormous_prompt_that_does_not_fit_is_told_the_limit(model: Path, kind: str) -> None:
    async def main() -> None:
        async with (
            gateway_world(model, max_model_len=4096) as world,
            httpx.AsyncClient(base_url=world.address, timeout=60.0) as http,
        ):
            reply = await http.post("/v1/completions", json={"model": "tiny", "prompt": LONG_PROMPTS[kind]})
            assert reply.status_code == 400
            error = reply.json()["error"]
            assert (error["code"], "4096" in error["message"]) == ("context_length_exceeded", True)
            assert world.router.served == {}

    run(main())


def test_bodies_that_wait_for_the_tokenizer_are_bounded_together(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "MAX_BODIES", 1)
    go_on = threading.Event()
    encode = ModelTokenizer._encode

    def slow(self: ModelTokenizer, texts: Sequence[str], add_special_tokens: bool) -> list[Sequence[int]]:
        assert len(texts[0]) < 1000 or go_on.wait(20.0)
        return encode(self, texts, add_special_tokens)

    monkeypatch.setattr(ModelTokenizer, "_encode", slow)

    async def main() -> None:
        async with (
            gateway_world(model, "gateway.max_body_mb=1", max_model_len=2_000_000) as world,
            httpx.AsyncClient(base_url=world.address, timeout=60.0) as http,
        ):
            world.router.answer = lambda served: served.end("length")
            body = {"model": "tiny", "prompt": "word " * 150_000}
            large = [asyncio.ensure_future(http.post("/v1/completions", json=body)) for _ in range(2)]
            [done], [waiting] = await asyncio.wait(large, return_when=asyncio.FIRST_COMPLETED)
            refused = done.result()
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
            assert refused.headers["retry-after"] == "1"
            small = await http.post("/v1/completions", json=body | {"prompt": "x"})
            assert small.status_code == 200
            go_on.set()
            assert (await waiting).status_code == 200

    try:
        run(main())
    finally:
        go_on.set()
