"""A connection that has gone is told at once, after what had come by it, and only if it had been there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import closing

import pytest

from microserve.protocol.bus.sockets import Client
from microserve.protocol.bus.transport import ServerSocket, ZmqBus
from tests.support.bus.socket_world import ANY, LOOPS, on_bus, until


def other_bus() -> closing[ZmqBus]:
    return closing(ZmqBus(linger_s=0.2))


def serve(bus: ZmqBus, address: str = ANY) -> ServerSocket:
    def answer(peer: bytes, frames: list[bytes]) -> None:
        server.send(peer, frames)

    server = bus.server(address, answer)
    return server


@pytest.mark.parametrize("loop", LOOPS)
def test_the_end_of_the_peer_is_told_once_each_time(loop: str) -> None:
    async def test(bus: ZmqBus) -> None:
        told: list[str] = []
        answers: list[list[bytes]] = []
        address = ANY
        client = None
        for life in (1, 2, 3):
            with other_bus() as peers:
                server = serve(peers, address)
                address = server.address
                if client is None:
                    client = bus.client(address, answers.append, on_disconnect=lambda: told.append("gone"))
                client.send([b"x"])
                await until(lambda life=life: len(answers) == life)  # type: ignore[misc]
                assert len(told) == life - 1
            await until(lambda life=life: len(told) == life)  # type: ignore[misc]

    on_bus(test, loop=loop)


@pytest.mark.parametrize("loop", LOOPS)
def test_what_came_before_the_end_is_handed_over_before_it(loop: str) -> None:
    count = 3000

    async def test(bus: ZmqBus) -> None:
        told: list[bytes] = []
        done = asyncio.Event()

        def gone() -> None:
            told.append(b"gone")
            done.set()

        with other_bus() as peers:

            def flood(peer: bytes, frames: list[bytes]) -> None:
                for i in range(count):
                    server.send(peer, [b"%d" % i])
                server.close()

            server = peers.server(ANY, flood)
            bus.client(server.address, lambda frames: told.append(frames[0]), on_disconnect=gone).send([b"x"])
            async with asyncio.timeout(30):
                await done.wait()
        assert told == [*(b"%d" % i for i in range(count)), b"gone"]

    on_bus(test, loop=loop)


def test_a_peer_that_never_answers_the_handshake_was_never_there() -> None:
    async def test(bus: ZmqBus) -> None:
        told: list[str] = []
        num_accepted = 0

        async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal num_accepted
            num_accepted += 1
            writer.close()
            await writer.wait_closed()

        listener = await asyncio.start_server(hang_up, "127.0.0.1", 0)
        host, port = listener.sockets[0].getsockname()
        bus.client(f"tcp://{host}:{port}", lambda frames: None, on_disconnect=lambda: told.append("gone"))
        await until(lambda: num_accepted >= 5)
        listener.close()
        await listener.wait_closed()
        assert not told

    on_bus(test)


@pytest.mark.parametrize("when", ["before", "in the callback", "twice"])
def test_closing_ends_the_watch(when: str) -> None:
    async def test(bus: ZmqBus) -> None:
        told: list[str] = []

        def gone() -> None:
            told.append("gone")
            client.close()

        with other_bus() as peers:
            server = serve(peers)
            answers: list[list[bytes]] = []
            client = bus.client(server.address, answers.append, on_disconnect=gone)
            watched = bus.client(server.address, answers.append, on_disconnect=lambda: told.append("other"))
            for socket in (client, watched):
                socket.send([b"x"])
            await until(lambda: len(answers) == 2)
            if when != "in the callback":
                client.close()
            if when == "twice":
                client.close()
        await until(lambda: "other" in told)
        await until(lambda: ("gone" in told) == (when == "in the callback"))
        watched.close()

    on_bus(test)


def test_a_callback_that_raises_is_counted_and_ends_nothing() -> None:
    async def test(bus: ZmqBus) -> None:
        def gone() -> None:
            raise ZeroDivisionError

        with other_bus() as peers:
            server = serve(peers)
            address = server.address
            answers: list[list[bytes]] = []
            client = bus.client(address, answers.append, on_disconnect=gone)
            client.send([b"x"])
            await until(lambda: bool(answers))
        await until(lambda: bus.failed == 1)
        with other_bus() as peers:
            serve(peers, address)
            client.send([b"y"])
            await until(lambda: len(answers) == 2)
        await until(lambda: bus.failed == 2)

    on_bus(test)


def test_a_client_that_does_not_ask_is_not_watched() -> None:
    async def test(bus: ZmqBus) -> None:
        client = bus.client("tcp://127.0.0.1:9", lambda frames: None)
        assert isinstance(client, Client)
        assert client._monitor is None

    on_bus(test)


@pytest.mark.parametrize(
    "connect",
    [
        lambda bus: bus.client("nowhere", lambda frames: None, on_disconnect=lambda: None),
        lambda bus: bus.client("tcp://127.0.0.1:x", lambda frames: None, on_disconnect=lambda: None),
    ],
)
def test_nothing_is_left_open_when_the_address_is_none(connect: Callable[[ZmqBus], None]) -> None:
    async def test(bus: ZmqBus) -> None:
        with pytest.raises(OSError, match="cannot connect"):
            connect(bus)

    on_bus(test)  # closing the bus would wait for ever
