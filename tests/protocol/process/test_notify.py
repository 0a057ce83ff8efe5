"""What systemd hears, over real datagram sockets; and when the watchdog is fed."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from microserve.protocol.process.lifecycle import Lifecycle
from microserve.protocol.process.notify import Notifier
from microserve.protocol.process.run import feed_watchdog
from tests.support.process.descriptors import no_descriptors

TIMEOUT_S = 20.0


@pytest.fixture(params=["path", "abstract"])
def listener(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        name = f"microserve-test-{os.getpid()}"
        address = str(tmp_path / "notify") if request.param == "path" else f"@{name}"
        listening.bind(address.replace("@", "\0", 1))
        listening.settimeout(TIMEOUT_S)
        yield listening, address


def test_sends_lines_to_paths_and_abstract_names(listener: tuple[socket.socket, str]) -> None:
    listening, address = listener
    with closing(Notifier(address)) as notifier:
        assert notifier.send("READY=1", "STATUS=up")
    assert listening.recv(200) == b"READY=1\nSTATUS=up"


def test_words_need_one_descriptor_in_all_and_a_listener_that_is_back_is_found(tmp_path: Path) -> None:
    path = str(tmp_path / "notify")
    with closing(Notifier(path)) as notifier:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
            listening.bind(path)
            assert notifier.send("READY=1")
            with no_descriptors():
                assert notifier.send("WATCHDOG=1")
            assert [listening.recv(200) for _ in range(2)] == [b"READY=1", b"WATCHDOG=1"]
        os.unlink(path)
        assert not notifier.send("WATCHDOG=1")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
            listening.bind(path)
            assert notifier.send("WATCHDOG=1")


def test_nobody_listening_is_no_error(tmp_path: Path) -> None:
    assert not Notifier().send("READY=1")
    assert not Notifier(str(tmp_path / "nowhere")).send("READY=1")


def test_a_full_queue_does_not_block(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "notify"))
        with closing(Notifier(str(tmp_path / "notify"))) as notifier:
            # Nobody reads: some datagrams fit, then each is refused at once.
            assert not all(notifier.send("WATCHDOG=1") for _ in range(10_000))


@pytest.mark.parametrize(
    ("environment", "watchdog_s"),
    [
        ({}, 0.0),
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, 0.0),
        ({"WATCHDOG_USEC": "soon"}, 0.0),
    ],
)
def test_watchdog_period_comes_from_the_environment(environment: dict[str, str], watchdog_s: float) -> None:
    assert Notifier.from_environment(environment).watchdog_s == watchdog_s


def test_ready_is_told_once_with_the_address(listener: tuple[socket.socket, str]) -> None:
    listening, address = listener
    with closing(Notifier(address)) as notifier:
        lifecycle = Lifecycle(notifier)
        lifecycle.ready("tcp://127.0.0.1:1")
        lifecycle.ready("tcp://127.0.0.1:2")
        lifecycle.status("3 requests")
    assert listening.recv(200) == b"READY=1\nSTATUS=ready at tcp://127.0.0.1:1\nX_ADDRESS=tcp://127.0.0.1:1"
    assert listening.recv(100) == b"STATUS=3 requests"
    assert asyncio.run(lifecycle.wait_ready()) == "tcp://127.0.0.1:1"


def test_ready_tells_what_else_there_is_to_show(listener: tuple[socket.socket, str]) -> None:
    listening, address = listener
    with closing(Notifier(address)) as notifier:
        Lifecycle(notifier).ready("tcp://a:1", about="exact in c1", facts={"exact": "true"})
    assert listening.recv(200) == (
        b"READY=1\nSTATUS=ready at tcp://a:1, exact in c1\nX_ADDRESS=tcp://a:1\nX_ABOUT=exact in c1\n"
        b'X_FACTS={"exact": "true"}'
    )


class Recorder(Notifier):
    """Records on the loop instead of sending, so that a test can wait for it."""

    def __init__(self, watchdog_s: float) -> None:
        super().__init__(watchdog_s=watchdog_s)
        self.sent = asyncio.Queue[str]()

    def send(self, *lines: str) -> bool:
        for line in lines:
            self.sent.put_nowait(line)
        return True


def test_the_watchdog_is_fed_while_the_service_is_well_and_only_then() -> None:
    async def test() -> None:
        notifier = Recorder(watchdog_s=0.06)
        lifecycle = Lifecycle(notifier)
        questions = asyncio.Queue[None]()
        well = True

        def healthy() -> bool:
            questions.put_nowait(None)
            return well

        lifecycle.set_health(healthy)
        async with asyncio.timeout(TIMEOUT_S), asyncio.TaskGroup() as group:
            feeding = group.create_task(feed_watchdog(lifecycle, notifier))
            assert await notifier.sent.get() == "WATCHDOG=1"
            well = False
            while not questions.empty():
                questions.get_nowait()
            while not notifier.sent.empty():
                notifier.sent.get_nowait()
            for _ in range(3):  # asked, and each time without a ping
                await questions.get()
            assert notifier.sent.empty()
            well = True
            assert await notifier.sent.get() == "WATCHDOG=1"
            feeding.cancel()

    asyncio.run(test())


def test_without_a_watchdog_nothing_is_fed() -> None:
    asyncio.run(asyncio.wait_for(feed_watchdog(Lifecycle(), Recorder(0.0)), TIMEOUT_S))
