"""No message waits for another: the FD is edge-triggered, and any use of the socket takes the edge."""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import select
from collections.abc import Callable

import pytest
import zmq
from structlog.testing import capture_logs

from microserve.protocol import log
from microserve.protocol.bus import sockets as module
from microserve.protocol.bus import transport
from microserve.protocol.bus.sockets import Client
from microserve.protocol.bus.transport import ZmqBus
from tests.support.bus.socket_world import ANY, LOOPS, echo_server, on_bus, until

pytestmark = pytest.mark.slow


async def connected_raw_peer(bus: ZmqBus, received: list[bytes]) -> tuple[Client, bytes, zmq.Socket[bytes]]:
    """A client of ours, its routing id, and the plain ROUTER that it is connected to."""
    raw = bus.context.socket(zmq.ROUTER)
    raw.set_hwm(bus.high_water_mark)
    raw.bind(ANY)
    client = bus.client(raw.getsockopt_string(zmq.LAST_ENDPOINT), lambda frames: received.append(frames[0]))
    assert isinstance(client, Client)
    client.send([b"hello"])
    await until(lambda: raw.poll(0) != 0)
    return client, raw.recv_multipart()[0], raw


def is_readable(socket: Client, timeout_s: float) -> bool:
    """Asks the FD, which takes no edge, as asking the socket would."""
    return bool(select.select([socket._socket.fileno()], [], [], timeout_s)[0])


def hold_loop_until_readable(socket: Client) -> None:
    assert is_readable(socket, 10.0)
    select.select([], [], [], 0.002)  # libzmq looks for commands once a millisecond


@pytest.mark.parametrize("loop", LOOPS)
def test_edge_trigger_under_load_in_both_directions(loop: str) -> None:
    """Each side sends inside its handler, so every send may take the edge of what comes in meanwhile."""
    num_clients, in_flight, round_trips = 4, 32, 13_000

    async def test(bus: ZmqBus) -> None:
        server = echo_server(bus)
        finished = asyncio.Event()
        left = num_clients

        def make_client() -> Callable[[], None]:
            sent = received = 0

            def on_frames(frames: list[bytes]) -> None:
                nonlocal received, left
                assert frames == [b"%d" % received, b"payload"]
                received += 1
                if received == round_trips:
                    left -= 1
                    if not left:
                        finished.set()
                fill()

            def fill() -> None:
                nonlocal sent
                while sent < round_trips and sent - received < in_flight:
                    assert client.send([b"%d" % sent, b"payload"])
                    sent += 1

            client = bus.client(server.address, on_frames)
            return fill

        for fill in [make_client() for _ in range(num_clients)]:
            fill()
        async with asyncio.timeout(60):
            await finished.wait()
        assert bus.received == bus.sent == 2 * num_clients * round_trips > 100_000
        assert bus.dropped == 0

    on_bus(test, loop=loop)


@pytest.mark.parametrize("loop", LOOPS)
def test_edge_trigger_when_sends_come_from_outside_the_handlers(loop: str) -> None:
    """One message at a time each way, sent from a task: a lost edge would stop it for good."""

    async def test(bus: ZmqBus) -> None:
        answers: asyncio.Queue[list[bytes]] = asyncio.Queue()
        server = echo_server(bus)
        client = bus.client(server.address, answers.put_nowait)
        for i in range(3000):
            client.send([b"%d" % i])
            async with asyncio.timeout(30):
                assert await answers.get() == [b"%d" % i]

    on_bus(test, loop=loop)


def test_send_that_takes_the_edge_does_not_hide_what_came_in() -> None:
    """The loop is held while a message arrives and another is sent: the FD is quiet when the loop looks."""

    async def test(bus: ZmqBus) -> None:
        received: list[bytes] = []
        client, peer, raw = await connected_raw_peer(bus, received)
        edges_taken = 0
        for i in range(50):
            raw.send_multipart([peer, b"%d" % i])
            hold_loop_until_readable(client)
            assert client.send([b"x"])
            edges_taken += not is_readable(client, 0.0)
            await until(lambda i=i: len(received) == i + 1)  # type: ignore[misc]

        assert edges_taken > 25
        assert received == [b"%d" % i for i in range(50)]
        raw.close(0)

    on_bus(test)


def test_refused_send_that_takes_the_edge_does_not_hide_what_came_in() -> None:
    async def test(bus: ZmqBus) -> None:
        received: list[bytes] = []
        client, peer, raw = await connected_raw_peer(bus, received)
        refusals = 0
        async with asyncio.timeout(30):
            while refusals < 20:  # in a row: by then the kernel's buffers are full as well
                refusals = 0 if client.send([b"x" * 200_000]) else refusals + 1
                await asyncio.sleep(0.002)
        edges_taken = 0
        for i in range(50):
            raw.send_multipart([peer, b"%d" % i])
            hold_loop_until_readable(client)
            refused = not client.send(
                [b"x" * 200_000]
            )  # now and then there is room: the kernel's buffers grow
            edges_taken += refused and not is_readable(client, 0.0)
            await until(lambda i=i: len(received) == i + 1)  # type: ignore[misc]

        assert edges_taken > 10
        raw.close(0)

    on_bus(test, high_water_mark=10)


def test_burst_beyond_one_turn_is_drained_and_others_get_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_FRAMES_PER_TURN", 16)

    async def test(bus: ZmqBus) -> None:
        received: list[bytes] = []
        turns: list[int] = []
        server = bus.server(ANY, lambda peer, frames: received.append(frames[0]))
        client = bus.client(server.address, lambda frames: None)
        for i in range(2000):
            assert client.send([b"%d" % i])

        def turn() -> None:
            turns.append(len(received))
            if len(received) < 2000:
                asyncio.get_running_loop().call_soon(turn)

        turn()
        await until(lambda: len(received) == 2000)
        assert received == [b"%d" % i for i in range(2000)]
        assert max(b - a for a, b in itertools.pairwise(turns)) <= 2 * 16

    on_bus(test)


def test_a_connection_that_never_ends_does_not_keep_its_service(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "CLOSE_S", 0.2)

    async def main() -> None:
        bus = ZmqBus(linger_s=0.0)
        held = bus.context.socket(zmq.DEALER)  # as libzmq sees a socket whose pipes have not come to an end
        with capture_logs() as lines:
            bus.close()
        assert [line["event"] for line in lines] == [log.BUS_NOT_CLOSED]
        held.close(0)

    asyncio.run(main())


@pytest.mark.parametrize("loop", LOOPS)
def test_what_comes_in_is_handled_in_the_context_of_who_opened_the_socket(loop: str) -> None:
    """Not of whoever sends just then: what a handler starts would be taken for the sender's."""
    sender: contextvars.ContextVar[str] = contextvars.ContextVar("sender", default="nobody")
    seen: list[str] = []

    async def test(bus: ZmqBus) -> None:
        peers: list[bytes] = []

        def handle(peer: bytes, frames: list[bytes]) -> None:
            peers.append(peer)
            seen.append(sender.get())

        server = bus.server(ANY, handle)
        client = bus.client(server.address, lambda frames: None)
        client.send([b"first"])
        await until(lambda: bool(peers))
        for number in range(200):
            client.send([b"more"])
            contextvars.Context().run(lambda: (sender.set("somebody"), server.send(peers[0], [b"word"])))
            while len(seen) < number + 2:
                await asyncio.sleep(0)
                contextvars.Context().run(lambda: (sender.set("somebody"), server.send(peers[0], [b"word"])))

    on_bus(test, loop=loop)
    assert set(seen) == {"nobody"}
