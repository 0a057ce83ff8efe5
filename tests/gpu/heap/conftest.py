"""These tests need a GPU and its driver, and say so where there is none."""

from __future__ import annotations

import pytest

from microserve.kvcache.heap.gpu.cuda_driver import LibCuda
from microserve.protocol.errors import ConfigError


@pytest.fixture(scope="session", autouse=True)
def driver() -> LibCuda:
    try:
        return LibCuda()
    except ConfigError as error:
        pytest.skip(f"needs an NVIDIA GPU: {error.detail}")
