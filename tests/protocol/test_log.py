"""Event names, and lines that a machine can read."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from microserve.protocol import log

NAMES = {name: value for name, value in vars(log).items() if name.isupper() and isinstance(value, str)}


@pytest.fixture(autouse=True)
def _fresh_logging() -> Iterator[None]:
    yield
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_names_are_noun_and_past_and_match_their_constants() -> None:
    assert len(NAMES) > 30
    for name, value in NAMES.items():
        assert re.fullmatch(r"[a-z]+\.[a-z_]+", value), value
        assert name == value.upper().replace(".", "_")
    assert len(set(NAMES.values())) == len(NAMES)


def test_a_line_is_an_object_with_service_id_level_and_time(tmp_path: Path) -> None:
    file = log.configure("engine", "e1", directory=str(tmp_path / "logs"))
    assert file is not None
    structlog.get_logger().info(log.ENGINE_JOINED, engine_id="e2", path=tmp_path, ratio=0.5)
    file.close()

    [line] = lines(tmp_path / "logs" / "engine-e1.jsonl")
    ts = line.pop("ts")
    assert ts > 1_600_000_000
    assert line.pop("path").endswith(f"{tmp_path.name}')")
    assert line == {
        "event": "engine.joined",
        "engine_id": "e2",
        "ratio": 0.5,
        "service": "engine",
        "id": "e1",
        "level": "info",
    }


def test_file_is_appended_to_and_readable_at_once(tmp_path: Path) -> None:
    for _ in range(2):
        file = log.configure("index", "i", directory=str(tmp_path))
        assert file is not None
        structlog.get_logger().info(log.SERVICE_READY)
        assert lines(tmp_path / "index-i.jsonl")[-1]["event"] == "service.ready"
        file.close()

    assert len(lines(tmp_path / "index-i.jsonl")) == 2


def test_level_filters(tmp_path: Path) -> None:
    file = log.configure("index", "i", level="warning", directory=str(tmp_path))
    assert file is not None
    structlog.get_logger().info(log.SERVICE_READY)
    structlog.get_logger().warning(log.ENGINE_LOST)
    file.close()

    assert [line["event"] for line in lines(tmp_path / "index-i.jsonl")] == ["engine.lost"]


def test_exception_is_structured(tmp_path: Path) -> None:
    file = log.configure("index", "i", directory=str(tmp_path))
    assert file is not None
    try:
        raise ValueError("broken")
    except ValueError:
        structlog.get_logger().exception(log.BUS_HANDLER_FAILED)
    file.close()

    [line] = lines(tmp_path / "index-i.jsonl")
    assert line["exception"][0]["exc_type"] == "ValueError"
    assert line["exception"][0]["exc_value"] == "broken"


def test_bound_context_is_in_every_line_and_a_new_service_starts_clean(tmp_path: Path) -> None:
    first = log.configure("router", "r", directory=str(tmp_path))
    assert first is not None
    structlog.contextvars.bind_contextvars(request_id="q")
    structlog.get_logger().info(log.REQUEST_ACCEPTED)
    second = log.configure("index", "i", directory=str(tmp_path))
    assert second is not None
    structlog.get_logger().info(log.SERVICE_READY)
    first.close()
    second.close()

    assert lines(tmp_path / "router-r.jsonl")[0]["request_id"] == "q"
    assert "request_id" not in lines(tmp_path / "index-i.jsonl")[0]


def test_without_a_directory_lines_go_to_stderr_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)

    assert log.configure("index", "i") is None
    structlog.get_logger().info(log.SERVICE_READY, address="a")

    assert json.loads(stderr.getvalue())["address"] == "a"
