"""A vLLM for the tests that are marked so, started once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from microserve.services.engine.vllm.link import Freed
from tests.support.vllm.hosted import Hosted, Peer


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with heads as wide as vLLM's CPU kernels want them."""
    from tests.support.engine.model.tiny_model import make_tiny_model

    return make_tiny_model(
        tmp_path_factory.mktemp("vllm") / "tiny",
        hidden_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_hidden_layers=3,
    )


@pytest.fixture(scope="session")
def started(vllm_python: Path, model: Path) -> Iterator[Hosted]:
    hosted = Hosted(vllm_python, model)
    try:
        hosted.start()
        yield hosted
    finally:
        hosted.close()


@pytest.fixture
def vllm(started: Hosted) -> Iterator[Hosted]:
    """At rest before and after, with nothing kept, no block lost, and each receive freed once."""
    started.forget()
    started.heard.clear()
    started.outputs.clear()
    free = started.call("free_blocks")
    yield started
    started.settle()
    assert started.call("num_requests") == 0
    assert started.call("free_blocks") == free
    started.notices(Freed)
    assert started.freed == dict.fromkeys(started.begun, 1)


@pytest.fixture
def peer(started: Hosted) -> Iterator[Peer]:
    peer = Peer(started.layout)
    yield peer
    peer.close()
