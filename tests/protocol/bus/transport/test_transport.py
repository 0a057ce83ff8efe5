"""Sockets inside the loop: nothing is lost unseen, nothing is left open."""

from __future__ import annotations

import asyncio
import os
import resource
import tempfile
from pathlib import Path

import pytest
import structlog
import zmq

from microserve.protocol import log
from microserve.protocol.bus.curve import create_keys
from microserve.protocol.bus.transport import Bus, ZmqBus
from microserve.protocol.errors import ConfigError
from tests.support.bus.socket_world import ANY, LOOPS, echo_server, on_bus, until


def test_peers_are_told_apart_and_each_gets_its_own_answer() -> None:
    async def test(bus: ZmqBus) -> None:
        answers: dict[int, list[list[bytes]]] = {0: [], 1: [], 2: []}

        def answer(peer: bytes, frames: list[bytes]) -> None:
            server.send(peer, [peer, *frames])

        server = bus.server(ANY, answer)
        clients = [bus.client(server.address, answers[i].append) for i in answers]
        for i, client in enumerate(clients):
            client.send([b"%d" % i, b""])
        await until(lambda: all(answers.values()))

        assert [answers[i][0][1:] for i in answers] == [[b"0", b""], [b"1", b""], [b"2", b""]]
        assert len({answers[i][0][0] for i in answers}) == 3

    on_bus(test)


def test_peer_that_never_was_is_counted_and_not_raised() -> None:
    async def test(bus: ZmqBus) -> None:
        server = bus.server(ANY, lambda peer, frames: None)

        assert not server.send(b"nobody", [b"x"])
        assert (bus.dropped, bus.sent) == (1, 0)

    on_bus(test)


def test_peer_that_is_gone_is_counted_and_not_raised() -> None:
    async def test(bus: ZmqBus) -> None:
        peers: list[bytes] = []
        server = bus.server(ANY, lambda peer, frames: peers.append(peer))
        client = bus.client(server.address, lambda frames: None)
        client.send([b"hello"])
        await until(lambda: bool(peers))
        client.close()

        await until(lambda: not server.send(peers[0], [b"x"]))
        assert bus.dropped == 1

    on_bus(test)


def test_high_water_mark_refuses_and_nothing_accepted_is_lost() -> None:
    async def test(bus: ZmqBus) -> None:
        raw = bus.context.socket(zmq.ROUTER)
        raw.set_hwm(10)
        raw.bind(ANY)
        client = bus.client(raw.getsockopt_string(zmq.LAST_ENDPOINT), lambda frames: None)
        payload = b"x" * 200_000  # more than the kernel's buffers hold in all
        accepted = 0
        async with asyncio.timeout(30):
            while client.send([b"%d" % accepted, payload]):
                accepted += 1
                await asyncio.sleep(0)
        assert bus.dropped == 1
        assert accepted < 1000

        for i in range(accepted):
            assert raw.poll(10_000), "an accepted message is delivered"
            assert raw.recv_multipart()[1] == b"%d" % i
        await until(lambda: client.send([b"again"]))
        raw.close(0)

    on_bus(test, high_water_mark=10)


def test_router_refuses_a_peer_that_does_not_read() -> None:
    async def test(bus: ZmqBus) -> None:
        peers: list[bytes] = []
        server = bus.server(ANY, lambda peer, frames: peers.append(peer))
        raw = bus.context.socket(zmq.DEALER)
        raw.set_hwm(10)
        raw.connect(server.address)
        raw.send(b"hello")
        reader = bus.client(server.address, lambda frames: None)
        await until(lambda: bool(peers))
        async with asyncio.timeout(30):
            while server.send(peers[0], [b"x" * 200_000]):
                await asyncio.sleep(0)
        assert bus.dropped == 1

        reader.send([b"hello"])
        await until(lambda: len(peers) == 2)
        assert server.send(peers[1], [b"others are served"])
        raw.close(0)

    on_bus(test, high_water_mark=10)


def test_handler_that_raises_costs_its_message_only() -> None:
    async def test(bus: ZmqBus) -> None:
        received: list[bytes] = []

        def handle(peer: bytes, frames: list[bytes]) -> None:
            if frames == [b"bad"]:
                raise ValueError("a bug")
            received.append(frames[0])

        server = bus.server(ANY, handle)
        client = bus.client(server.address, lambda frames: None)
        with structlog.testing.capture_logs() as events:
            for message in (b"1", b"bad", b"2"):
                client.send([message])
            await until(lambda: received == [b"1", b"2"])

        assert bus.failed == 1
        assert [(e["event"], e["address"]) for e in events] == [(log.BUS_HANDLER_FAILED, server.address)]

    on_bus(test)


def test_events_reach_every_subscriber_in_order() -> None:
    async def test(bus: ZmqBus) -> None:
        publisher = bus.publisher(ANY)
        received: list[list[bytes]] = [[], []]
        subscribers = [
            bus.subscriber(publisher.address, lambda frames, i=i: received[i].append(frames[1]))  # type: ignore[misc]
            for i in range(2)
        ]
        sent = 0

        def joined() -> bool:
            nonlocal sent
            publisher.send([b"topic", b"%d" % sent])
            sent += 1
            return all(received)

        await until(joined)
        await until(lambda: all(got[-1] == b"%d" % (sent - 1) for got in received))
        for got in received:
            first = int(got[0])
            assert got == [b"%d" % i for i in range(first, sent)]
        with pytest.raises(TypeError):
            subscribers[0].send([b"x"])

    on_bus(test)


def test_address_that_is_taken_is_an_os_error_and_leaves_nothing_open() -> None:
    async def test(bus: ZmqBus) -> None:
        server = bus.server(ANY, lambda peer, frames: None)
        with pytest.raises(OSError, match=f"cannot bind {server.address}"):
            bus.publisher(server.address)

        assert len(bus.sockets) == 1

    on_bus(test)


def test_exposed_address_is_refused_without_keys_and_leaves_nothing_open() -> None:
    async def test(bus: ZmqBus) -> None:
        for address in ("tcp://0.0.0.0:0", "tcp://*:0"):
            with pytest.raises(ConfigError, match="reachable from other machines"):
                bus.server(address, lambda peer, frames: None)
            with pytest.raises(ConfigError):
                bus.publisher(address)

    on_bus(test)  # closing a bus with a socket left open would wait for ever


@pytest.mark.parametrize("address", ["", "nonsense", "tcp://", "tcp://host:x", "foo://x"])
def test_address_that_is_none_is_an_os_error_and_leaves_nothing_open(address: str) -> None:
    async def test(bus: ZmqBus) -> None:
        with pytest.raises(OSError, match="cannot connect to"):
            bus.client(address, lambda frames: None)
        with pytest.raises(OSError, match="cannot connect to"):
            bus.subscriber(address, lambda frames: None)

    on_bus(test)


def test_server_key_that_is_none_is_an_os_error_and_leaves_nothing_open(tmp_path: Path) -> None:
    async def test() -> None:
        bus = ZmqBus(keys=create_keys(tmp_path))
        try:
            with pytest.raises(OSError, match="cannot connect to"):
                bus.client("tcp://127.0.0.1:1", lambda frames: None, server_key="no key")
        finally:
            bus.close()

    asyncio.run(test())


def test_client_outlives_its_server() -> None:
    """A server that returns at the same address is found again, and its peer has kept its name."""

    async def test(bus: ZmqBus, address: str) -> None:
        peers: list[bytes] = []
        server = bus.server(address, lambda peer, frames: peers.append(peer))
        client = bus.client(address, lambda frames: None)
        client.send([b"1"])
        await until(lambda: bool(peers))
        server.close()
        bus.server(address, lambda peer, frames: peers.append(peer))
        await until(lambda: client.send([b"2"]) and len(peers) >= 2)
        assert len(set(peers)) == 1

    # Not TCP: a port that is free now may be somebody else's a moment later.
    with tempfile.TemporaryDirectory(prefix="mesh") as directory:
        on_bus(lambda bus: test(bus, f"ipc://{directory}/place"))


def test_closed_socket_sends_nothing_and_is_forgotten() -> None:
    async def test(bus: ZmqBus) -> None:
        received: list[bytes] = []
        server = bus.server(ANY, lambda peer, frames: received.append(frames[0]))
        client = bus.client(server.address, lambda frames: None)
        client.close()
        client.close()

        assert not client.send([b"x"])
        assert len(bus.sockets) == 1

    on_bus(test)


def test_handler_may_close_its_own_socket() -> None:
    async def test(bus: ZmqBus) -> None:
        received: list[list[bytes]] = []

        def once(frames: list[bytes]) -> None:
            received.append(frames)
            client.close()

        def answer(peer: bytes, frames: list[bytes]) -> None:
            for _ in range(9):
                server.send(peer, [b"x"])

        server = bus.server(ANY, answer)
        client = bus.client(server.address, once)
        client.send([b"hello"])
        await until(lambda: len(bus.sockets) == 1)
        assert len(received) == 1

    on_bus(test)


def test_what_was_sent_before_close_arrives() -> None:
    async def test(bus: ZmqBus) -> None:
        received: list[bytes] = []
        server = bus.server(ANY, lambda peer, frames: received.append(frames[0]))
        client = bus.client(server.address, lambda frames: None)
        for i in range(100):
            client.send([b"%d" % i])
        client.close()

        await until(lambda: received == [b"%d" % i for i in range(100)])

    on_bus(test, linger_s=10.0)


@pytest.mark.parametrize("loop", LOOPS)
def test_close_leaves_nothing(loop: str) -> None:
    def num_files() -> int:
        return len(os.listdir("/proc/self/fd"))

    async def test(bus: ZmqBus) -> None:
        server = echo_server(bus)
        publisher = bus.publisher(ANY)
        answers: list[list[bytes]] = []
        for _ in range(5):
            bus.client(server.address, answers.append).send([b"x"])
            bus.subscriber(publisher.address, answers.append)
        await until(lambda: len(answers) == 5)

    on_bus(test, loop=loop)  # the first use of a loop may open files of its own
    before = num_files()
    for _ in range(3):
        on_bus(test, loop=loop)

    assert num_files() == before


def test_zmq_bus_is_a_bus() -> None:
    async def test(bus: ZmqBus) -> None:
        as_bus: Bus = bus
        assert as_bus.public_key == ""

    on_bus(test)


def test_an_ipv6_address_is_one_like_others() -> None:
    async def test(bus: ZmqBus) -> None:
        answered: list[bytes] = []
        server = bus.server("tcp://[::1]:0", lambda peer, frames: void(server.send(peer, frames)))
        assert server.address.startswith("tcp://[::1]:")
        client = bus.client(server.address, lambda frames: answered.append(frames[0]))
        client.send([b"six"])
        publisher = bus.publisher("tcp://[::1]:0")
        bus.subscriber(publisher.address, lambda frames: answered.append(frames[0]))
        await until(lambda: b"six" in answered)
        async with asyncio.timeout(30):
            while b"event" not in answered:
                publisher.send([b"event"])
                await asyncio.sleep(0.005)

    on_bus(test)


def void(_: object) -> None:
    pass


@pytest.mark.slow
def test_a_process_has_room_for_the_sockets_of_1024_engines() -> None:
    """Four for each: its DEALER, that one's monitor (two), and the SUB for its events."""

    async def test(bus: ZmqBus) -> None:
        answered = 0

        def count(frames: list[bytes]) -> None:
            nonlocal answered
            answered += 1

        server = bus.server(ANY, lambda peer, frames: void(server.send(peer, frames)))
        publisher = bus.publisher(ANY)
        num_engines = min(1024, (resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 200) // 8)
        assert num_engines > 255
        for _ in range(num_engines):
            client = bus.client(server.address, count, on_disconnect=lambda: None)
            bus.subscriber(publisher.address, lambda frames: None)
            client.send([b"x"])
        await until(lambda: answered == num_engines)

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard if hard < 1 << 20 else max(soft, 16_384), hard))
    try:
        on_bus(test)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_socket_too_many_is_an_os_error_that_says_so() -> None:
    async def test(bus: ZmqBus) -> None:
        bus.context.set(zmq.MAX_SOCKETS, 4)
        with pytest.raises(OSError, match="no socket: Too many open files"):
            for _ in range(5):
                bus.client("tcp://127.0.0.1:1", lambda frames: None)

    on_bus(test)
