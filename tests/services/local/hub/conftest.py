"""A Hub on loopback with one small model, and an empty cache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from microserve.services.local.hub import client
from microserve.services.local.hub.place import Place
from tests.support.hub.server import Hub, serving
from tests.support.hub.small_model import FILES


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub(tokens={"hf_member": {"org/tiny"}, "hf_stranger": set()})
    hub.add("org/tiny", dict(FILES))
    with serving(hub):
        yield hub


@pytest.fixture
def place(hub: Hub, tmp_path: Path) -> Place:
    return Place(tmp_path / "hub", tmp_path / "records", hub.endpoint)


@pytest.fixture(autouse=True)
def small_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of 100 kB comes in many pieces; a broken connection is tried again at once."""
    monkeypatch.setattr(client, "CHUNK_NBYTES", 1000)
    monkeypatch.setattr(client.HubClient.__init__, "__defaults__", (0.0,))
