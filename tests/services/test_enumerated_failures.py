"""Each call that the system may refuse fails once, at each point of a request's life: the request and the
others are served exactly, and nothing is left behind.

ENOSPC, EIO, EMFILE and ENOMEM, for every line of a log, every socket and every peer's heap that is opened, in
router, engines, index and a gateway's links, over real sockets.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import structlog

from microserve.gateway.routers.client import RouterClient
from microserve.kvcache.heap.local import MemoryHeap
from microserve.protocol.bus.transport import ZmqBus
from microserve.protocol.errors import InternalError
from microserve.protocol.logging import writer
from microserve.protocol.logging.setup import Log, configure
from microserve.protocol.logging.sink import FileSink
from microserve.protocol.logging.writer import Writer
from microserve.protocol.messages.strategy.control import PUBLISH, Change
from microserve.protocol.settings.settings import LogSettings
from microserve.services.index.control_log import ControlLog
from tests.services.test_lost_messages import ask, serve
from tests.support.bus.lossy_mesh import LossyMesh, lossy_mesh
from tests.support.router.router_world import in_loop

pytestmark = pytest.mark.slow

ERRORS = [
    *(
        OSError(number, os.strerror(number))
        for number in (errno.ENOSPC, errno.EIO, errno.EMFILE, errno.ENOMEM)
    ),
    MemoryError(),
]


@dataclass
class Calls:
    """Of one function: how many there were, and whether the chosen one has failed."""

    count: int = 0
    failed: bool = False


@contextmanager
def failing(owner: Any, name: str, chosen: int, error: BaseException) -> Iterator[Calls]:
    """The call with number ``chosen`` (from 1) of ``owner.name`` raises ``error``; 0: none does."""
    calls, true = Calls(), getattr(owner, name)

    def call(*arguments: Any, **named: Any) -> Any:
        calls.count += 1
        if calls.count == chosen:
            calls.failed = True
            raise error
        return true(*arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, call)
        yield calls


@pytest.fixture
def lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Log]:
    """A real log, to a file; written line by line, so that a request's are written while it runs."""
    monkeypatch.setattr(writer, "LINGER_S", 0.0)
    made = configure("mesh", "m", LogSettings(dir=str(tmp_path)))
    yield made
    made.close()
    structlog.reset_defaults()


async def each_call(mesh: LossyMesh, owner: Any, name: str, strategy: str) -> int:
    """A request for each call that one makes and each error; the number of failures."""
    await mesh.joined()
    number = failures = 0
    with failing(owner, name, 0, ERRORS[0]) as calls:
        await serve(mesh, number, strategy)
    num_calls = calls.count
    for error in ERRORS:
        for chosen in range(1, num_calls + 1):
            number += 1
            leave_peers(mesh)
            with failing(owner, name, chosen, error) as calls:
                await serve(mesh, number, strategy)
            failures += calls.failed
            await serve(mesh, 1000 + number, strategy)
    return failures


def leave_peers(mesh: LossyMesh) -> None:
    """So that the next transfer opens its peer's heap anew."""
    for core in mesh.cores.values():
        with core.lock:
            core._peers.close()


@pytest.mark.parametrize(
    ("owner", "name"),
    [(Log, "_line"), (Writer, "put"), (FileSink, "write")],
    ids=["made", "queued", "written"],
)
@pytest.mark.usefixtures("lines")
def test_every_line_of_a_log(owner: Any, name: str) -> None:
    @in_loop
    async def test() -> None:
        async with lossy_mesh("a", "b") as mesh:
            assert await each_call(mesh, owner, name, "disaggregated") > 5

    test()


@in_loop
async def test_every_peers_heap_that_is_opened() -> None:
    async with lossy_mesh("a", "b") as mesh:
        assert await each_call(mesh, MemoryHeap, "attach", "disaggregated") >= len(ERRORS)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOMEM])
def test_every_socket_that_router_engines_and_index_open(number: int) -> None:
    error = OSError(number, os.strerror(number))

    outcomes: list[bool] = []

    @in_loop
    async def one(chosen: int) -> None:
        async with lossy_mesh(
            "a", "b"
        ) as mesh:  # what a service opens once it runs: the first wait starts it
            with failing(ZmqBus, "make_socket", chosen, error) as calls:
                await mesh.joined()
                await serve(mesh, chosen, "disaggregated")
            outcomes.append(calls.failed)

    while not outcomes or outcomes[-1]:
        one(len(outcomes) + 1)
    assert len(outcomes) > 8


@in_loop
async def test_every_socket_that_a_gateway_opens() -> None:
    async with lossy_mesh("a") as mesh:
        await mesh.joined()
        for chosen in (1, 2):
            with failing(ZmqBus, "make_socket", chosen, OSError(errno.EMFILE, "files")) as calls:
                routers = RouterClient(
                    mesh.from_gateways,
                    [mesh.router.address],
                    gateway_id="g",
                    incarnation=chosen,
                    model="hash",
                    credit=2,
                    heartbeat_interval_s=mesh.settings.bus.heartbeat_interval_s,
                    liveness=mesh.settings.bus.liveness,
                    clock=time.monotonic,
                )
                beating = routers.start()
                await ask(routers, chosen)
                assert calls.failed and not beating.done()
                await routers.close()


class Disk:
    """A database of which one call fails."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self.failing = False
        self._database = database

    def execute(self, *arguments: Any) -> Any:
        if self.failing:
            self.failing = False
            raise sqlite3.OperationalError("disk I/O error")
        return self._database.execute(*arguments)

    def close(self) -> None:
        self._database.close()


def test_a_control_log_without_room_refuses_one_change_and_takes_the_next(tmp_path: Path) -> None:
    log = ControlLog(str(tmp_path / "control.db"))
    disk = log._database = Disk(log._database)  # type: ignore[assignment]
    change = Change(1, "id", PUBLISH, "s", "source")
    disk.failing = True
    with pytest.raises(InternalError):
        log.append(change, "who")
    assert log.fold.version == 0
    assert log.append(change, "who") == 1
    disk.failing = True
    with pytest.raises(InternalError):
        log.records()
    assert [record.version for record in log.records()] == [1]
    log.close()
