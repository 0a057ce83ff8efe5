"""Joining a world inside one process: what is refused before anybody waits, and whose death is watched."""

from __future__ import annotations

import asyncio
import faulthandler
import os
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
import structlog

from microserve.kvcache.heap.gpu.cuda_driver import CudaDriver
from microserve.kvcache.heap.gpu.nvshmem_world import SymmetricMemory
from microserve.kvcache.heap.process import this_namespace, this_process
from microserve.kvcache.layout import KvLayout
from microserve.protocol import log
from microserve.protocol.bus.curve import create_keys
from microserve.protocol.bus.transport import ZmqBus
from microserve.protocol.errors import ConfigError, DeadlineExceeded
from microserve.protocol.messages.world import WorldRank
from microserve.protocol.process.lifecycle import Lifecycle
from microserve.protocol.settings.settings import Settings
from microserve.protocol.settings.sources import load_settings
from microserve.services.engine import world as world_module
from microserve.services.engine.world import Library, World, _is_provable, join_world
from microserve.services.index.service import run_index
from tests.support.engine.device.host_driver import HostDriver
from tests.support.engine.device.host_world import HostRank, HostWorld
from tests.support.kvcache.kv_samples import make_layout

NUM_RANKS = 2


@dataclass
class Bench:
    """An index and one bus for all, under CURVE, and a stand-in for the library."""

    address: str
    keys: str
    bus: ZmqBus
    world: HostWorld = field(default_factory=lambda: HostWorld(NUM_RANKS))
    asked: list[tuple[bytes, int, int, int, int]] = field(default_factory=list)
    """What worlds were made with."""

    def make_library(self) -> Library:
        driver = HostDriver()

        def make_world(
            unique_id: bytes, *, rank: int, num_ranks: int, device: int, symmetric_nbytes: int
        ) -> SymmetricMemory:
            self.asked.append((unique_id, rank, num_ranks, device, symmetric_nbytes))
            return HostRank(self.world, rank, driver)

        def make_driver(device: int) -> CudaDriver:
            return driver

        return Library(lambda: b"fresh", make_world, make_driver)

    def settings(self, rank: int, *overrides: str) -> Settings:
        return load_settings(
            overrides=[
                f"bus.curve_dir={self.keys}",
                f"index.address={self.address}",
                "bus.heartbeat_interval_s=0.05",
                "engine.device=cuda:0",
                "kvcache.heap=nvshmem",
                "kvcache.grant_slots=2",
                "nvshmem.world=w",
                f"nvshmem.rank={rank}",
                f"nvshmem.num_ranks={NUM_RANKS}",
                "nvshmem.memory_mb=1",
                *overrides,
            ]
        )

    async def join(
        self,
        rank: int,
        *overrides: str,
        layout: KvLayout | None = None,
        lifecycle: Lifecycle | None = None,
        library: Library | None = None,
    ) -> World:
        return await join_world(
            self.settings(rank, *overrides),
            self.bus,
            lifecycle or Lifecycle(),
            layout or make_layout(),
            50 + rank,
            device=3,
            library=library or self.make_library(),
        )


def at_the_index(tmp_path: Path, test: Callable[[Bench], Awaitable[None]], *, is_there: bool = True) -> None:
    async def run() -> None:
        keys = create_keys(tmp_path / "keys")
        bus = ZmqBus(linger_s=0.1, keys=keys)
        bench = Bench(f"ipc://{tmp_path}/index", str(tmp_path / "keys"), bus)
        index = asyncio.create_task(run_index(bench.settings(0), bus)) if is_there else None
        try:
            async with asyncio.timeout(30):
                await test(bench)
        finally:
            if index is not None:
                index.cancel()
                await asyncio.wait([index])
            bus.close()

    asyncio.run(run())


def test_engines_of_a_world_write_into_each_other(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        lifecycle = Lifecycle()
        first, second = await asyncio.gather(bench.join(0, lifecycle=lifecycle), bench.join(1))
        assert sorted(bench.asked) == [(b"fresh", rank, NUM_RANKS, 3, 1 << 20) for rank in range(NUM_RANKS)]
        assert [world.heap.address.incarnation for world in (first, second)] == [50, 51]
        assert lifecycle.skips_exit_handlers
        word = first.heap.words.arrival(0, 1, 0)
        with second.heap.attach(first.heap.address) as peer:
            assert peer.hold(0, 1)
            peer.signal(word, 5)
            peer.let_go(0, 1)
            peer.poll(wait=True)
        first.heap.poll(wait=True)
        assert first.heap.load(word) == 5
        for world in (first, second):
            world.heap.close()

    at_the_index(tmp_path, test)


def test_who_has_joined_is_not_ended_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    is_armed: list[bool] = []
    arm, disarm = faulthandler.dump_traceback_later, faulthandler.cancel_dump_traceback_later

    def armed(*args: Any, **options: Any) -> None:
        is_armed.append(True)
        arm(*args, **options)

    def disarmed() -> None:
        is_armed.append(False)
        disarm()

    monkeypatch.setattr(faulthandler, "dump_traceback_later", armed)
    monkeypatch.setattr(faulthandler, "cancel_dump_traceback_later", disarmed)

    async def test(bench: Bench) -> None:
        world = await bench.join(0, "nvshmem.num_ranks=1")
        world.heap.close()

    at_the_index(tmp_path, test)
    assert is_armed == [True, False, True, False], "for the unique id, and for the heap"


@pytest.mark.parametrize(
    ("layout", "override", "field"),
    [
        (make_layout(num_blocks=1 << 16), "nvshmem.memory_mb=1", "nvshmem.memory_mb"),
        (make_layout(model="m" * 5000), "nvshmem.memory_mb=1", "model.name"),
    ],
)
def test_a_pool_without_room_is_said_before_the_others_hear_of_us(
    tmp_path: Path, layout: KvLayout, override: str, field: str
) -> None:
    async def test(bench: Bench) -> None:
        lifecycle = Lifecycle()
        with pytest.raises(ConfigError) as caught:
            await bench.join(0, override, layout=layout, lifecycle=lifecycle)
        assert caught.value.field == field
        assert caught.value.detail.startswith(f"{field}: "), "the log has this line only"
        assert not lifecycle.skips_exit_handlers

    at_the_index(tmp_path, test, is_there=False)


def test_what_the_library_lacks_is_said_by_the_setting_that_asks_for_it(tmp_path: Path) -> None:
    def no_driver(device: int) -> CudaDriver:
        raise ConfigError(f"cuda:{device} cannot be used", field="device")

    def no_library() -> bytes:
        raise ConfigError("the nvshmem heap needs nvshmem4py", field="heap")

    async def test(bench: Bench) -> None:
        parts = bench.make_library()
        for library, path in (
            (Library(parts.new_unique_id, parts.make_world, no_driver), "engine.device"),
            (Library(no_library, parts.make_world, parts.make_driver), "kvcache.heap"),
        ):
            with pytest.raises(ConfigError) as caught:
                await bench.join(0, library=library)
            assert caught.value.field == path
            assert caught.value.detail.startswith(f"{path}: ")

    at_the_index(tmp_path, test, is_there=False)


def test_the_deadline_says_what_was_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world_module, "GRACE_S", 1000.0)  # else a slow machine ends this very process

    async def absent(bench: Bench) -> None:
        with pytest.raises(DeadlineExceeded, match=r"after 0\.3 s: the index does not answer"):
            await bench.join(0, "nvshmem.join_timeout_s=0.3")

    async def alone(bench: Bench) -> None:
        with pytest.raises(DeadlineExceeded, match=r"of the ranks, \[1\] have not come"):
            await bench.join(0, "nvshmem.join_timeout_s=1")

    async def stuck(bench: Bench) -> None:
        release = threading.Event()
        parts = bench.make_library()

        def wait() -> bytes:
            release.wait()
            return b""

        library = Library(wait, parts.make_world, parts.make_driver)
        try:
            with pytest.raises(DeadlineExceeded, match="the library has given no unique id"):
                await bench.join(0, "nvshmem.join_timeout_s=0.3", library=library)
        finally:
            faulthandler.cancel_dump_traceback_later()
            release.set()

    async def slow_driver(bench: Bench) -> None:
        parts = bench.make_library()

        def make_driver(device: int) -> CudaDriver:
            threading.Event().wait(0.5)
            return parts.make_driver(device)

        library = Library(parts.new_unique_id, parts.make_world, make_driver)
        try:
            with pytest.raises(DeadlineExceeded, match=r"after 0\.4 s"):
                await bench.join(0, "nvshmem.join_timeout_s=0.4", "nvshmem.num_ranks=1", library=library)
        finally:
            faulthandler.cancel_dump_traceback_later()

    at_the_index(tmp_path, absent, is_there=False)
    for number, test in enumerate((alone, stuck, slow_driver)):
        (tmp_path / str(number)).mkdir()
        at_the_index(tmp_path / str(number), test)


# --- deaths


def heap_of_two(tmp_path: Path, test: Callable[[World, World], None]) -> None:
    async def run(bench: Bench) -> None:
        worlds = await asyncio.gather(bench.join(0), bench.join(1))
        test(*worlds)
        for world in worlds:
            world.heap.close()

    at_the_index(tmp_path, run)


def test_who_is_watched_is_reported_once_when_it_is_gone(tmp_path: Path) -> None:
    def test(first: World, second: World) -> None:
        with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
            start = int(Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[19])
            ours = WorldRank(50, this_namespace(), this_process())
            theirs = WorldRank(51, this_namespace(), child.pid << 42 | start)
            world, lock = World(first.heap, [ours, theirs]), threading.Lock()
            report_dead, is_locked = first.heap.report_dead, []

            def report(incarnation: int) -> None:
                is_locked.append(lock.locked())
                report_dead(incarnation)

            first.heap.report_dead = report  # type: ignore[method-assign]
            with structlog.testing.capture_logs() as logs:
                world.look_for_deaths(lock)
                assert not logs
                child.kill()
                child.wait()
                world.look_for_deaths(lock)
                world.look_for_deaths(lock)
        assert is_locked == [True]
        assert [(entry["event"], entry["incarnation"]) for entry in logs] == [(log.RANK_LOST, 51)]
        assert first.heap.dead == {51}

    heap_of_two(tmp_path, test)


def test_a_rank_of_another_host_or_namespace_is_never_reported(tmp_path: Path) -> None:
    """Its word may name somebody here, or nobody: neither proves anything."""
    nobody = (1 << 22) - 1 << 42 | 7
    elsewhere = WorldRank(51, "another-boot pid:[4026531836]", this_process())
    mistaken = WorldRank(52, this_namespace(), nobody)
    ours = WorldRank(50, this_namespace(), this_process())

    async def run(bench: Bench) -> None:
        assert [_is_provable(each, 53) for each in (elsewhere, mistaken, ours)] == [False, False, True]
        assert not _is_provable(ours, ours.incarnation)

    at_the_index(tmp_path, run, is_there=False)


def test_the_word_of_a_process_and_its_namespace_are_what_the_index_is_told() -> None:
    boot, _, namespace = this_namespace().partition(" ")
    assert boot == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert namespace == os.readlink("/proc/self/ns/pid")
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(this_process())) == this_process()
