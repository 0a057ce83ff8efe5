"""Heaps of an engine's settings: what cannot be had is said by the setting that asked for it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from microserve.kvcache.heap import factory
from microserve.kvcache.heap.factory import make_heap
from microserve.kvcache.heap.heap import Heap
from microserve.kvcache.heap.shm import ShmHeap
from microserve.kvcache.layout import KvLayout
from microserve.protocol.bus.transport import ZmqBus
from microserve.protocol.errors import ConfigError, TransferFailed
from microserve.protocol.process.lifecycle import Lifecycle
from microserve.protocol.settings.sources import load_settings
from microserve.services.engine import service
from microserve.services.engine.model.model import LoadedModel
from microserve.services.engine.service import run_engine
from tests.support.engine.device.host_driver import HostDriver


def test_a_pool_that_the_device_has_no_room_for_is_said_by_its_setting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Full(HostDriver):
        def __init__(self, device: int) -> None:
            super().__init__()

        def allocate(self, nbytes: int) -> int:
            raise ConfigError(f"no {nbytes} bytes on the device: out of memory (2)", field="num_blocks")

    monkeypatch.setattr(factory, "LibCuda", Full)
    settings = load_settings(overrides=["engine.device=cuda:0", "kvcache.heap=cuda_ipc"])
    with pytest.raises(ConfigError, match=r"kvcache\.num_blocks.*out of memory") as refused:
        make_heap(settings, KvLayout("m", 2, 8, 16, 2, 64, "float32"), 7)
    assert refused.value.field == "kvcache.num_blocks"


def test_a_start_that_fails_after_its_heap_was_made_gives_it_back(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Path
) -> None:
    made: list[Heap] = []

    def broken(settings: object, model: LoadedModel, engine_id: str, heap: Heap, *more: object) -> object:
        made.append(heap)
        raise ConfigError("decode steps cannot be captured", field="engine.cuda_graphs")

    async def main() -> None:
        bus = ZmqBus(linger_s=0.0)
        try:
            await run_engine(settings, bus, Lifecycle())
        finally:
            bus.close()

    monkeypatch.setattr(service, "make_core", broken)
    settings = load_settings(overrides=[f"model.path={tiny_model}", "kvcache.num_blocks=64"])
    with pytest.raises(ConfigError, match="cannot be captured"):
        asyncio.run(main())
    (heap,) = made
    with ShmHeap(heap.layout, incarnation=9) as other, pytest.raises(TransferFailed):
        other.attach(heap.address)
