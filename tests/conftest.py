"""Models that several test folders share, made or fetched once a session."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 2 layers with a byte-level tokenizer."""
    from tiny_model import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """SmolLM2-135M-Instruct, converted on first use."""
    from microserve.services.demo_model import default_cache, fetch

    return fetch(default_cache(os.environ))


@pytest.fixture(autouse=True)
def nothing_left_in_shared_memory() -> object:
    """No test may leave a segment behind."""
    before = set(os.listdir("/dev/shm"))
    yield
    left = set(os.listdir("/dev/shm")) - before
    assert not {name for name in left if "microserve" in name}
