"""Tests that need an NVIDIA GPU: skipped with a reason on every other machine.

They start nothing at import, so that collecting them needs neither a GPU nor CuPy.
"""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def gpu() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: torch.cuda.is_available() is False")
    return torch.device("cuda", torch.cuda.current_device())
