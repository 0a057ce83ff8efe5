"""The guard over real sockets: who is let in and for how long, and who is cut."""

from __future__ import annotations

import asyncio
import shutil
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import structlog

from microserve.protocol import log
from microserve.protocol.bus.curve import create_keys
from microserve.protocol.bus.transport import ServerSocket, ZmqBus
from microserve.protocol.security.rights import EVERYBODY, Entrance, Role
from microserve.protocol.types import NO_KEY
from tests.support.bus.socket_world import ANY, until
from tests.support.security.flood import READY, greeting

REVOKED_S = 5.0
"""What B5 calls seconds; it takes one."""
MIB = 1 << 20


class Pair:
    """A service and one who calls it, each with keys of its own."""

    def __init__(self, root: Path, place: str = "trusted", entrance: Entrance = Entrance.ANY) -> None:
        self.directory = root / "service"
        self.keys, self.caller_keys = create_keys(self.directory), create_keys(root / "caller")
        self.caller_file = root / "caller" / "service.key"
        self.place = self.directory / place / "caller.key"
        self.entrance = entrance
        self.heard: list[bytes] = []
        self.answered: list[bytes] = []
        self.roles: set[frozenset[Role]] = set()

    def trust(self) -> None:
        self.place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(self.caller_file, self.place)

    def __enter__(self) -> Pair:
        self.bus = ZmqBus(keys=self.keys, linger_s=0)
        self.caller_bus = ZmqBus(keys=self.caller_keys, linger_s=0)
        self.server: ServerSocket = self.bus.server(ANY, self._answer, self.entrance)
        self.client = self.caller_bus.client(
            self.server.address,
            lambda frames: self.answered.append(frames[0]),
            server_key=self.keys.public.decode(),
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.caller_bus.close()
        self.bus.close()

    def _answer(self, peer: bytes, frames: list[bytes]) -> None:
        self.heard.append(frames[0])
        self.roles.add(self.server.sender_roles)
        self.server.send(peer, frames)

    async def asks(self, what: bytes) -> None:
        """Until it is answered."""
        async with asyncio.timeout(60):
            while what not in self.answered:
                self.client.send([what])
                await asyncio.sleep(0.01)


@pytest.mark.slow
def test_a_key_is_trusted_once_its_file_is_there_also_by_the_socket_that_was_refused(tmp_path: Path) -> None:
    async def test() -> None:
        with Pair(tmp_path, "trusted/router", Entrance.INDEX) as pair:
            with structlog.testing.capture_logs() as logs:
                pair.client.send([b"early"])
                await until(lambda: any(each["event"] == log.PEER_REFUSED for each in logs))
            assert pair.heard == []
            pair.trust()
            await pair.asks(b"late")
            assert pair.roles == {frozenset({Role.ROUTER})}

    asyncio.run(test())


@pytest.mark.slow
def test_a_key_that_is_taken_away_is_not_heard_within_seconds_and_its_connection_ends(tmp_path: Path) -> None:
    async def test() -> None:
        with Pair(tmp_path) as pair:
            pair.trust()
            await pair.asks(b"one")
            pair.place.unlink()
            began, num_heard = time.monotonic(), -1
            while num_heard != len(pair.heard):
                num_heard = len(pair.heard)
                pair.client.send([b"two"])
                await asyncio.sleep(0.2)
                assert time.monotonic() - began < REVOKED_S
            assert pair.bus.refused >= 1
            heard = len(pair.heard)
            for _ in range(10):
                pair.client.send([b"three"])
                await asyncio.sleep(0.02)
            assert len(pair.heard) == heard
            pair.trust()
            await pair.asks(b"four")

    asyncio.run(test())


@pytest.mark.slow
def test_a_reader_whose_key_is_taken_away_hears_nothing_more_and_others_go_on(tmp_path: Path) -> None:
    async def test() -> None:
        keys = {name: create_keys(tmp_path / name) for name in ("engine", "good", "bad")}
        for name in ("good", "bad"):
            shutil.copy(tmp_path / name / "service.key", tmp_path / "engine" / "trusted" / f"{name}.key")
        buses = {name: ZmqBus(keys=each, linger_s=0) for name, each in keys.items()}
        heard: dict[str, list[bytes]] = {"good": [], "bad": []}
        try:
            publisher = buses["engine"].publisher(ANY, Entrance.EVENTS)
            for name, its in heard.items():
                buses[name].subscriber(
                    publisher.address,
                    lambda frames, its=its: its.append(frames[0]),  # type: ignore[misc]
                    server_key=keys["engine"].public.decode(),
                )

            async def publish(what: bytes, enough: Callable[[], bool]) -> None:
                async with asyncio.timeout(60):
                    while not enough():
                        publisher.send([what])
                        await asyncio.sleep(0.01)

            await publish(b"1", lambda: b"1" in heard["good"] and b"1" in heard["bad"])
            (tmp_path / "engine" / "trusted" / "bad.key").unlink()
            began = time.monotonic()
            await publish(b"2", lambda: time.monotonic() - began > REVOKED_S / 2)
            await publish(b"3", lambda: b"3" in heard["good"])
            assert b"3" not in heard["bad"]
        finally:
            for bus in buses.values():
                bus.close()

    asyncio.run(test())


@pytest.mark.parametrize("role", ["gateway", "engine"])
def test_a_role_with_no_business_at_a_socket_does_not_get_in(tmp_path: Path, role: str) -> None:
    async def test() -> None:
        waiting = Pair(tmp_path, f"trusted/{role}", Entrance.REPLAY)
        waiting.trust()
        with waiting as pair:
            with structlog.testing.capture_logs() as logs:
                pair.client.send([b"x"])
                await until(lambda: any(each["event"] == log.PEER_REFUSED for each in logs))
            assert [each["roles"] for each in logs if each["event"] == log.PEER_REFUSED] == [[role]]
            assert pair.heard == []

    asyncio.run(test())


def raw(address: str) -> socket.socket:
    url = urlsplit(address)
    return socket.create_connection((url.hostname or "", url.port or 0), timeout=20.0)


def test_without_keys_everybody_is_everything_and_a_flood_is_cut_while_others_are_served() -> None:
    async def test() -> None:
        bus = ZmqBus(linger_s=0)
        answered: list[bytes] = []

        def answer(peer: bytes, frames: list[bytes]) -> None:
            assert server.sender_roles == EVERYBODY
            server.send(peer, frames)

        try:
            server = bus.server(ANY, answer)
            client = bus.client(server.address, lambda frames: answered.append(frames[0]))
            with structlog.testing.capture_logs() as logs, raw(server.address) as flood:
                flood.sendall(greeting(b"NULL") + READY)
                piece = b"\x03" + struct.pack(">Q", MIB) + bytes(MIB)
                is_cut, sent, asked = False, 0, 0
                flood.setblocking(False)
                async with asyncio.timeout(60):
                    while not is_cut:
                        try:
                            sent += flood.send(piece[sent % len(piece) :])
                        except BlockingIOError:
                            pass
                        except OSError:
                            is_cut = True
                        if len(answered) == asked:  # one at a time: a busy machine has no backlog then
                            asked += 1
                            client.send([b"%d" % asked])
                        await asyncio.sleep(0)
                await until(lambda: b"%d" % asked in answered)
            assert {each["why"] for each in logs if each["event"] == log.CONNECTION_CUT} == {"first"}
            assert bus.dropped == bus.failed == 0
        finally:
            bus.close()

    asyncio.run(test())


def test_a_long_prompt_is_no_flood() -> None:
    """Eight frames of 7 MiB at once, after a hello: they wait for their turn and are all handed over."""

    async def test() -> None:
        bus = ZmqBus(linger_s=0)
        heard: list[int] = []
        try:
            server = bus.server(ANY, lambda peer, frames: heard.append(len(frames[-1])))
            client = bus.client(server.address, lambda frames: None)
            client.send([b"hello"])
            await until(lambda: len(heard) == 1)
            for _ in range(8):
                client.send([b"generate", bytes(7 * MIB)])
            await until(lambda: len(heard) == 9)
            assert heard == [5, *[7 * MIB] * 8]
        finally:
            bus.close()

    asyncio.run(test())


@pytest.mark.slow
def test_a_bus_closes_also_when_strangers_hold_connections(tmp_path: Path) -> None:
    async def test() -> None:
        with Pair(tmp_path) as pair:
            strangers = [raw(pair.server.address) for _ in range(20)]
            pair.trust()
            await pair.asks(b"x")
        for each in strangers:
            each.close()

    asyncio.run(test())


def test_a_socket_that_is_open_asks_nobody_for_a_key_though_its_service_has_them(tmp_path: Path) -> None:
    """Off loopback too, and our own readers have to be told: a server's key that it does not have is none."""

    async def test() -> None:
        buses = [ZmqBus(keys=create_keys(tmp_path / "engine"), linger_s=0), ZmqBus(linger_s=0)]
        buses.append(ZmqBus(keys=create_keys(tmp_path / "router"), linger_s=0))
        heard: set[int] = set()
        try:
            publisher = buses[0].publisher("tcp://0.0.0.0:0", Entrance.OPEN)

            def answer(peer: bytes, frames: list[bytes]) -> None:
                replay.send(peer, frames)

            replay = buses[0].server("tcp://0.0.0.0:0", answer, Entrance.OPEN)
            clients = []
            for number, bus in enumerate(buses[1:]):
                for place, connect in enumerate((bus.subscriber, bus.client)):
                    address = (publisher, replay)[place].address.replace("0.0.0.0", "127.0.0.1")
                    client = connect(
                        address,
                        lambda _, which=2 * number + place: heard.add(which),  # type: ignore[misc]
                        server_key=NO_KEY,
                    )
                    clients += [client] if place else []
            async with asyncio.timeout(60):
                while len(heard) < 4:
                    publisher.send([b"x"])
                    for client in clients:
                        client.send([b"x"])
                    await asyncio.sleep(0.01)
        finally:
            for bus in buses:
                bus.close()

    asyncio.run(test())
