"""HTTP from the client's side, on real sockets: what is kept, what is noticed, what is told."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar

import pytest

from microserve.protocol.errors import ConfigError
from microserve.services.command.bench.load import run as run_on_uvloop
from microserve.services.command.client.endpoint import Endpoint
from microserve.services.command.client.http import Client
from tests.support.command.scripted_server import Asked, say_all, scripted_server

T = TypeVar("T")


def run(main: Coroutine[Any, Any, T]) -> T:
    async def bounded() -> T:
        async with asyncio.timeout(30):
            return await main

    return run_on_uvloop(bounded())


class Heard:
    def __init__(self) -> None:
        self.status, self.headers, self.content = 0, dict[str, str](), b""
        self.faults: list[str] = []
        self.came = asyncio.Event()

    def head(self, status: int, headers: Mapping[str, str]) -> None:
        self.status, self.headers = status, dict(headers)

    def body(self, data: bytes) -> None:
        self.content += data
        self.came.set()

    def end(self, fault: str) -> None:
        self.faults.append(fault)


async def ask(client: Client) -> Heard:
    heard = Heard()
    await client.exchange(client.endpoint.request("POST", "/v1/completions", b"{}"), heard)
    return heard


def test_a_connection_is_used_again() -> None:
    async def main() -> None:
        async with scripted_server(lambda asked: say_all(asked, "a")) as server:
            client = Client(server.endpoint)
            for _ in range(3):
                heard = await ask(client)
                assert (heard.status, heard.faults) == (200, [""])
                assert heard.content.endswith(b"data: [DONE]\n\n")
            await client.close()
            assert server.num_connections == 1

    run(main())


def test_a_connection_that_the_server_has_closed_is_replaced() -> None:
    async def main() -> None:
        closed = asyncio.Event()

        async def answer(asked: Asked) -> None:
            await asked.reply(200, {})
            asked.writer.close()
            await asked.writer.wait_closed()
            closed.set()

        async with scripted_server(answer) as server:
            client = Client(server.endpoint)
            for _ in range(2):
                heard = await ask(client)
                assert (heard.status, heard.content, heard.faults) == (200, b"{}", [""])
                await closed.wait()
            await client.close()
            assert server.num_connections == 2

    run(main())


def test_an_answer_that_is_cut_says_so() -> None:
    async def main() -> None:
        async def answer(asked: Asked) -> None:
            await asked.begin(x_microserve_engines="e0")
            await asked.say("half")
            asked.cut()

        async with scripted_server(answer) as server:
            client = Client(server.endpoint)
            heard = await ask(client)
            assert heard.headers["x-microserve-engines"] == "e0"
            assert len(heard.faults) == 1 and "closed before the answer's end" in heard.faults[0]

    run(main())


@pytest.mark.parametrize("said", [b"HTTP/1.0 200 OK\r\n\r\nuntil the end", b"SSH-2.0\r\n\r\n", b""])
def test_other_ends(said: bytes) -> None:
    async def main() -> None:
        async def answer(asked: Asked) -> None:
            await asked.write(said)
            asked.writer.close()

        async with scripted_server(answer) as server:
            client = Client(server.endpoint)
            heard = await ask(client)
            if said.startswith(b"HTTP"):
                assert (heard.content, heard.faults) == (b"until the end", [""])
            else:
                [fault] = heard.faults
                assert ("does not speak HTTP" if said else "without an answer") in fault

    run(main())


def test_an_interim_answer_is_none() -> None:
    async def main() -> None:
        async def answer(asked: Asked) -> None:
            await asked.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            await asked.reply(404, {"error": {"message": "no such path"}})

        async with scripted_server(answer) as server:
            assert (await ask(Client(server.endpoint))).status == 404

    run(main())


def test_who_gives_up_closes_the_connection() -> None:
    async def main() -> None:
        gone = asyncio.Event()

        async def answer(asked: Asked) -> None:
            await asked.begin()
            await asked.say("for ever")
            try:
                while True:
                    await asked.say("and ever")
                    await asyncio.sleep(0)
            finally:
                gone.set()

        async with scripted_server(answer) as server:
            client, heard = Client(server.endpoint), Heard()
            request = server.endpoint.request("POST", "/v1/completions", b"{}")
            asking = asyncio.create_task(client.exchange(request, heard))
            await heard.came.wait()
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            assert asking.cancelled()
            await gone.wait()
            await client.close()

    run(main())


def test_nobody_there() -> None:
    async def main() -> None:
        async with scripted_server(say_all) as server:
            endpoint = server.endpoint
        client = Client(endpoint)
        heard = await ask(client)
        [fault] = heard.faults
        assert fault.startswith(f"cannot connect to {endpoint.url}: ")
        with pytest.raises(ConnectionError, match="cannot connect"):
            await client.fetch("GET", "/v1/models")

    run(main())


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://h:1/v1", "http://h:1"),
        ("h:1", "http://h:1"),
        ("https://h/", "https://h:443"),
        ("http://[::1]:8000/v1/", "http://[::1]:8000"),
        ("http://h:1/openai/v1", "http://h:1/openai"),
    ],
)
def test_urls(url: str, shown: str) -> None:
    endpoint = Endpoint.at(url, "key")
    assert endpoint.url == shown
    head = endpoint.request("POST", "/v1/x", b"{}", {"a": "b"}).decode()
    assert head.startswith(f"POST {endpoint.prefix}/v1/x HTTP/1.1\r\n")
    assert "\r\nauthorization: Bearer key\r\n" in head and head.endswith("\r\na: b\r\n\r\n{}")


@pytest.mark.parametrize(
    "url", ["ftp://h", "http://", "http://h:99999", "http://u:p@h", "http://h/ x", "h?a"]
)
def test_what_is_no_url(url: str) -> None:
    with pytest.raises(ConfigError):
        Endpoint.at(url)


@pytest.mark.parametrize("value", ["a\r\nb: c", "two words", "ü"])
def test_no_value_becomes_two_headers(value: str) -> None:
    with pytest.raises(ConfigError):
        Endpoint.at("http://h", value)
    with pytest.raises(ConfigError):
        Endpoint.at("http://h").request("GET", "/", headers={"x-microserve-strategy": value})
