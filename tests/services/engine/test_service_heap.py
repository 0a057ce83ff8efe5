"""Heaps of an engine's settings: what cannot be had is said by the setting that asked for it."""

from __future__ import annotations

import pytest
from host_driver import HostDriver

from microserve.kvcache.layout import KvLayout
from microserve.protocol.errors import ConfigError
from microserve.protocol.settings import load_settings
from microserve.services.engine import service
from microserve.services.engine.service import make_heap


def test_a_pool_that_the_device_has_no_room_for_is_said_by_its_setting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Full(HostDriver):
        def __init__(self, device: int) -> None:
            super().__init__()

        def allocate(self, nbytes: int) -> int:
            raise ConfigError(f"no {nbytes} bytes on the device: out of memory (2)", field="num_blocks")

    monkeypatch.setattr(service, "LibCuda", Full)
    settings = load_settings(overrides=["engine.device=cuda:0", "kvcache.heap=cuda_ipc"])
    with pytest.raises(ConfigError, match=r"kvcache\.num_blocks.*out of memory") as refused:
        make_heap(settings, KvLayout("m", 2, 8, 16, 2, 64, "float32"), 7)
    assert refused.value.field == "kvcache.num_blocks"
