"""The calls of nvshmem4py, and what is said without it."""

from __future__ import annotations

import inspect
import os
import sys
import threading
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from microserve.kvcache.heap.gpu.nvshmem_world import UNIQUE_ID_NBYTES, NvshmemWorld, new_unique_id
from microserve.protocol.errors import ConfigError, InvalidRequest


def test_without_the_library_there_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvshmem", None)
    for call in (
        new_unique_id,
        lambda: NvshmemWorld(bytes(UNIQUE_ID_NBYTES), rank=0, num_ranks=1),
    ):
        with pytest.raises(ConfigError, match="nvshmem4py") as caught:
            call()
        assert caught.value.field == "heap"
        assert "\n" not in caught.value.detail


@pytest.mark.parametrize(
    ("unique_id", "rank", "field"),
    [(b"short", 0, "unique_id"), (bytes(UNIQUE_ID_NBYTES), 2, "rank"), (bytes(UNIQUE_ID_NBYTES), -1, "rank")],
)
def test_a_world_is_joined_with_sound_arguments_only(unique_id: bytes, rank: int, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        NvshmemWorld(unique_id, rank=rank, num_ranks=2)
    assert caught.value.field == field


class Library:
    """The functions of nvshmem4py 0.4.1 that are used, with its own parameters; writes down the calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def get_unique_id(self, empty: bool = False) -> Any:
        content = np.zeros(UNIQUE_ID_NBYTES, np.int8) if empty else np.arange(UNIQUE_ID_NBYTES, dtype=np.int8)
        return SimpleNamespace(_data=content.view(np.dtype([("version", "i4"), ("internal", "i1", 124)])))

    def init(
        self,
        device: Any = None,
        uid: Any = None,
        rank: int | None = None,
        nranks: int | None = None,
        mpi_comm: None = None,
        initializer_method: str = "",
    ) -> None:
        self.calls.append(("init", device, uid._data.tobytes(), rank, nranks, initializer_method))

    def finalize(self) -> None:
        self.calls.append(("finalize",))

    def malloc(self, size: int) -> int:
        return 0 if size > 2000 else 0x4F10

    def ptr(self, dest: int, pe: int) -> int:
        return dest + 0x100 * pe

    def barrier_all(self) -> None:
        self.calls.append(("barrier_all",))

    def putmem_on_stream(self, dest: int, source: int, bytes: int, pe: int, cstrm: int) -> None:
        self.calls.append(("put", dest, source, bytes, pe, cstrm))

    def getmem_on_stream(self, dest: int, source: int, bytes: int, pe: int, cstrm: int) -> None:
        self.calls.append(("get", dest, source, bytes, pe, cstrm))

    def signal_op_on_stream(self, sig_addr: int, signal: int, sig_op: int, pe: int, cstrm: int) -> None:
        self.calls.append(("signal", sig_addr, signal, sig_op, pe, cstrm))

    def quiet_on_stream(self, cstrm: int) -> None:
        self.calls.append(("quiet", cstrm))


class Device:
    def __init__(self, number: int) -> None:
        if number > 3:
            raise RuntimeError("Failed to dlopen libcuda.so.1\nand a second line")
        self.number = number

    def set_current(self) -> None:
        self.threads = [*getattr(self, "threads", []), threading.get_ident()]


def install(monkeypatch: pytest.MonkeyPatch) -> Library:
    """The stand-in takes the place of the library."""
    library = Library()
    for name, content in (
        ("nvshmem", SimpleNamespace()),
        ("nvshmem.core", library),
        ("nvshmem.bindings", library),
        ("cuda", SimpleNamespace()),
        ("cuda.core", SimpleNamespace(Device=Device)),
    ):
        module: Any = ModuleType(name)
        for attribute in dir(content):
            if not attribute.startswith("_"):
                setattr(module, attribute, getattr(content, attribute))
        monkeypatch.setitem(sys.modules, name, module)
    return library


def library_module() -> ModuleType:
    return sys.modules["nvshmem.bindings"]


def test_the_library_is_called_as_it_is_declared(monkeypatch: pytest.MonkeyPatch) -> None:
    library = install(monkeypatch)
    unique_id = new_unique_id()
    monkeypatch.delenv("NVSHMEM_SYMMETRIC_SIZE", raising=False)
    world = NvshmemWorld(unique_id, rank=1, num_ranks=2, device=3, symmetric_nbytes=1 << 30)
    assert 1 << 30 < int(os.environ["NVSHMEM_SYMMETRIC_SIZE"]) < 2 << 30
    monkeypatch.delenv("NVSHMEM_SYMMETRIC_SIZE")

    (name, device, joined_with, *rest) = library.calls.pop()
    assert (name, device.number, device.threads) == ("init", 3, [threading.get_ident()])
    assert joined_with == unique_id == bytes(range(UNIQUE_ID_NBYTES))
    assert rest == [1, 2, "uid"]
    # A capability: nothing that is shown tells it.
    assert unique_id.hex() not in world.name
    assert world.name == NvshmemWorld(unique_id, rank=0, num_ranks=2).name
    library.calls.clear()

    world.put(1, 2, 3, 4, 5)
    world.get(1, 2, 3, 4, 5)
    world.signal(1, 2, 4, 5)
    world.quiet(5)
    world.barrier()
    world.leave()

    assert library.calls == [
        ("put", 1, 2, 3, 4, 5),
        ("get", 1, 2, 3, 4, 5),
        ("signal", 1, 2, 9, 4, 5),
        ("quiet", 5),
        ("barrier_all",),
        ("finalize",),
    ]

    def call_twice() -> None:
        world.quiet(6)
        world.quiet(7)

    elsewhere = threading.Thread(target=call_twice)
    elsewhere.start()
    elsewhere.join()
    assert library.calls[-2:] == [("quiet", 6), ("quiet", 7)]
    assert len(device.threads) == 3, "each thread has it as its current device, from its first call on"
    assert device.threads[-1] != threading.get_ident()
    with pytest.raises(ConfigError, match=r"cuda:4 cannot be used: .*libcuda.so.1$") as caught:
        NvshmemWorld(unique_id, rank=0, num_ranks=2, device=4)
    assert caught.value.field == "device"
    assert world.allocate(1000) == 0x5000
    assert world.mapped_address(0x5000, 1) == 0x5100
    with pytest.raises(ConfigError):
        world.allocate(2000)


def test_one_thread_at_a_time_is_inside_of_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    library = install(monkeypatch)
    world = NvshmemWorld(new_unique_id(), rank=0, num_ranks=2)
    inside, others = threading.Event(), threading.Event()
    order: list[str] = []

    def slow(cstrm: int) -> None:
        order.append("in")
        inside.set()
        others.wait(5)
        order.append("out")

    monkeypatch.setattr(library_module(), "quiet_on_stream", slow)
    monkeypatch.setattr(library_module(), "barrier_all", lambda: order.append("barrier"))
    first = threading.Thread(target=lambda: world.quiet(1))
    first.start()
    inside.wait(5)
    second = threading.Thread(target=world.barrier)
    second.start()
    assert order == ["in"]
    others.set()
    for thread in (first, second):
        thread.join()
    assert order == ["in", "out", "barrier"]
    assert library.calls[0][0] == "init"


def test_the_installed_library_declares_what_is_called() -> None:
    core = pytest.importorskip("nvshmem.core", reason="needs nvshmem4py", exc_type=ImportError)
    bindings = pytest.importorskip("nvshmem.bindings", exc_type=ImportError)
    for name, ours in inspect.getmembers(Library(), inspect.ismethod):
        if not name.startswith("_"):
            theirs = getattr(core if hasattr(core, name) and not hasattr(bindings, name) else bindings, name)
            assert list(inspect.signature(theirs).parameters) == list(inspect.signature(ours).parameters), (
                name
            )
