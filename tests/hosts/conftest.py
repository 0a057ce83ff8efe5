"""Where hosts can be made they are; elsewhere each test says why not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.hosts.namespaces import why_not
from tests.support.hosts.world import World


@pytest.fixture(autouse=True)
def hosts_can_be_made() -> None:
    if reason := why_not():
        pytest.skip(reason)


@pytest.fixture
def world(tmp_path: Path, hosts_can_be_made: None) -> Iterator[World]:
    """A front and two hosts for engines."""
    with World(tmp_path) as made:
        yield made


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    (tmp_path / "logs").mkdir()
    return tmp_path / "logs"


@pytest.fixture
def vocab_size(tiny_model: Path) -> int:
    return int(json.loads((tiny_model / "config.json").read_text())["vocab_size"])
