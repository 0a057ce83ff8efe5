"""The stream's clock: pings while nothing comes, an end to writes that nobody reads, the head held back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, MutableMapping
from typing import Any

import pytest

from microserve.gateway.http.errors import ClientGone, ClientStalled
from microserve.gateway.http.exchange import (
    ARRIVED_EXTENSION,
    CONNECTION_EXTENSION,
    BodyBudget,
    Exchange,
    strategy_of,
    timeout_of,
)
from microserve.gateway.http.sse import DONE, PING, EventStream, event
from microserve.protocol.errors import InvalidRequest, MeshError
from tests.support.gateway.gateway_world import run

Message = MutableMapping[str, Any]


class Connection:
    """The server's end of ASGI: takes messages while it is open, and none while it is blocked."""

    def __init__(self, headers: list[tuple[bytes, bytes]] | None = None) -> None:
        self.sent: list[Message] = []
        self.writable = asyncio.Event()
        self.writable.set()
        self.wrote = asyncio.Event()
        self.incoming: asyncio.Queue[Message] = asyncio.Queue()
        self.aborted = asyncio.Event()
        self.scope = {
            "type": "http",
            "method": "POST",
            "path": "/",
            "headers": headers or [],
            "extensions": {CONNECTION_EXTENSION: self, ARRIVED_EXTENSION: 0.0},
        }
        self.exchange = Exchange(self.scope, self.incoming.get, self.send)

    def abort(self) -> None:
        self.aborted.set()
        self.writable.set()

    def is_closing(self) -> bool:
        return self.aborted.is_set()

    def tell_end(self, tell: Callable[[], None]) -> None:
        self.tell: Callable[[], None] | None = tell

    def tell_nobody(self, tell: Callable[[], None]) -> None:
        assert self.tell is tell
        self.tell = None

    @property
    def takes_more(self) -> bool:
        return self.writable.is_set()

    async def send(self, message: Message) -> None:
        await self.writable.wait()
        self.sent.append(message)
        self.wrote.set()

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)


def nothing(*_: object) -> None:
    pass


def test_the_head_waits_for_the_first_event() -> None:
    async def main() -> None:
        connection = Connection()
        async with EventStream(connection.exchange, on_idle=nothing, on_stall=nothing) as stream:
            assert not connection.exchange.started
            await stream.write(event(b"1"))
            await stream.write(event(b"2"))
            await stream.close(DONE)
        assert [message["type"] for message in connection.sent] == ["http.response.start"] + [
            "http.response.body"
        ] * 3
        assert connection.body == b"data: 1\n\ndata: 2\n\ndata: [DONE]\n\n"
        assert [message["more_body"] for message in connection.sent[1:]] == [True, True, False]
        head = dict(connection.sent[0]["headers"])
        assert head[b"content-type"].startswith(b"text/event-stream")
        assert b"content-length" not in head

    run(main())


def test_a_quiet_stream_is_pinged() -> None:
    async def main() -> None:
        connection = Connection()
        idle = asyncio.Event()
        stream = EventStream(connection.exchange, on_idle=idle.set, on_stall=nothing, ping_s=0.03)
        async with stream:
            await idle.wait()
            await stream.ping()
            assert connection.body == PING

    run(main())


def test_a_stalled_write_ends_the_stream() -> None:
    async def main() -> None:
        connection = Connection()
        errors: list[MeshError] = []
        stream = EventStream(connection.exchange, on_idle=nothing, on_stall=errors.append, stall_s=0.03)
        async with stream:
            connection.writable.clear()
            await stream.write(event(b"nobody reads this"))
        assert connection.aborted.is_set()
        assert [type(error) for error in errors] == [ClientStalled]

    run(main())


def test_a_write_that_moves_on_in_time_is_left_alone() -> None:
    async def main() -> None:
        connection = Connection()
        errors: list[MeshError] = []
        stream = EventStream(connection.exchange, on_idle=nothing, on_stall=errors.append, stall_s=10.0)
        async with stream:
            connection.writable.clear()
            writing = asyncio.create_task(stream.write(event(b"slow")))
            await asyncio.sleep(0)
            connection.writable.set()
            await writing
        assert errors == []

    run(main())


def test_the_watch_reports_a_closed_connection_once_and_not_after_the_answer() -> None:
    async def main() -> None:
        for complete in (False, True):
            connection = Connection()
            gone: list[MeshError] = []
            with connection.exchange.watch(gone.append):
                if complete:
                    await connection.exchange.reply(200, b"{}")
                assert connection.tell is not None
                connection.tell()
            assert len(gone) == (0 if complete else 1)
            assert connection.tell is None

    run(main())


@pytest.mark.parametrize(
    ("text", "seconds"), [(b"1.5", 1.5), (b"9999", 60.0), (b"inf", 60.0), (b"1e-3", 0.001)]
)
def test_the_clients_time(text: bytes, seconds: float) -> None:
    async def main() -> None:
        assert timeout_of(Connection([(b"x-microserve-timeout-s", text)]).exchange, 60.0) == seconds
        assert timeout_of(Connection().exchange, 60.0) == 60.0

    run(main())


@pytest.mark.parametrize("text", [b"0", b"-1", b"nan", b"soon", b""])
def test_a_time_that_is_none(text: bytes) -> None:
    async def main() -> None:
        with pytest.raises(InvalidRequest):
            timeout_of(Connection([(b"x-microserve-timeout-s", text)]).exchange, 60.0)

    run(main())


def test_ids_are_echoed_if_they_are_sane_and_unique_on_the_bus() -> None:
    async def main() -> None:
        def exchange(text: bytes) -> Exchange:
            return Connection([(b"x-request-id", text)]).exchange

        for sane in (b"abc", b"trace:1/2=x@y.z", b"x" * 128):
            one, two = exchange(sane), exchange(sane)
            assert one.request_id == two.request_id == sane.decode()
            assert one.unique_id != two.unique_id
            assert len(one.unique_id) <= 100
        for insane in (b"", b"x" * 129, b"a b", b"\xff", b'"'):
            assert exchange(insane).request_id != insane.decode("latin-1")
        with pytest.raises(InvalidRequest):
            strategy_of(Connection([(b"x-microserve-strategy", b"a b")]).exchange)

    run(main())


def test_header_values_of_peers_cannot_break_the_answer() -> None:
    async def main() -> None:
        connection = Connection()
        await connection.exchange.reply(200, b"", {"x-microserve-engines": "e0\r\nx-evil: 1,é"})
        assert (b"x-microserve-engines", b"e0??x-evil: 1,?") in connection.sent[0]["headers"]

    run(main())


def test_body_bytes_are_given_back() -> None:
    async def main() -> None:
        budget = BodyBudget(10, 100)
        connection = Connection()
        connection.incoming.put_nowait({"type": "http.request", "body": b"12345", "more_body": True})
        connection.incoming.put_nowait({"type": "http.request", "body": b"678", "more_body": False})
        assert await connection.exchange.read_body(budget) == b"12345678"
        assert budget.held_nbytes == 0

    run(main())


def test_what_cannot_wait_is_written_only_to_a_client_that_reads() -> None:
    async def main() -> None:
        connection = Connection()
        async with EventStream(connection.exchange, on_idle=nothing, on_stall=nothing) as stream:
            assert not stream.takes_more  # the head has not been sent
            await stream.write(event(b"1"))
            assert stream.takes_more
            stream.write_now(event(b"2"))
            connection.writable.clear()
            assert not stream.takes_more
            writing = asyncio.create_task(stream.write(event(b"3")))
            await asyncio.sleep(0)
            connection.writable.set()
            assert not stream.takes_more  # another write is under way
            await writing
            stream.write_now(event(b"4"))
        assert connection.body == b"".join(event(b"%d" % number) for number in range(1, 5))

    run(main())


def test_a_client_that_went_is_told_to_who_cannot_wait() -> None:
    async def main() -> None:
        connection = Connection()

        async def send(message: Message) -> None:
            if connection.is_closing():
                raise RuntimeError("the transport is closed")

        connection.exchange = Exchange(connection.scope, connection.incoming.get, send)
        async with EventStream(connection.exchange, on_idle=nothing, on_stall=nothing) as stream:
            await stream.write(event(b"1"))
            connection.abort()
            with pytest.raises(ClientGone):
                stream.write_now(event(b"2"))

    run(main())
