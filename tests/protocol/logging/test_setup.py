"""Lines that a machine can read, whatever is logged, and nothing that is logged raises."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from microserve.protocol import log
from microserve.protocol.errors import ConfigError
from microserve.protocol.logging.setup import Log, configure
from microserve.protocol.settings.settings import LogSettings


@pytest.fixture(autouse=True)
def _fresh_logging() -> Iterator[None]:
    yield
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def configured(directory: Path, service: str = "index", service_id: str = "i", **fields: Any) -> Log:
    return configure(service, service_id, LogSettings(dir=str(directory), **fields))


def test_a_line_is_an_object_with_service_id_level_and_time(tmp_path: Path) -> None:
    file = configured(tmp_path / "logs", "engine", "e1")
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
        file = configured(tmp_path)
        structlog.get_logger().info(log.SERVICE_READY)
        assert file.flush()
        assert lines(tmp_path / "index-i.jsonl")[-1]["event"] == "service.ready"
        file.close()

    assert len(lines(tmp_path / "index-i.jsonl")) == 2


def test_level_filters(tmp_path: Path) -> None:
    file = configured(tmp_path, level="warning")
    structlog.get_logger().info(log.SERVICE_READY)
    structlog.get_logger().warning(log.ENGINE_LOST)
    file.close()

    assert [line["event"] for line in lines(tmp_path / "index-i.jsonl")] == ["engine.lost"]


def test_exception_is_structured(tmp_path: Path) -> None:
    file = configured(tmp_path)
    try:
        raise ValueError("broken")
    except ValueError:
        structlog.get_logger().exception(log.BUS_HANDLER_FAILED)
    file.close()

    [line] = lines(tmp_path / "index-i.jsonl")
    assert line["exception"][0]["exc_type"] == "ValueError"
    assert line["exception"][0]["exc_value"] == "broken"


def test_bound_context_is_in_every_line_and_a_new_service_starts_clean(tmp_path: Path) -> None:
    first = configured(tmp_path, "router", "r")
    structlog.contextvars.bind_contextvars(request_id="q")
    structlog.get_logger().info(log.REQUEST_ACCEPTED)
    second = configured(tmp_path)
    structlog.get_logger().info(log.SERVICE_READY)
    first.close()
    second.close()

    assert lines(tmp_path / "router-r.jsonl")[0]["request_id"] == "q"
    assert "request_id" not in lines(tmp_path / "index-i.jsonl")[0]


def test_without_a_directory_lines_go_to_stderr_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)

    file = configure("index", "i")
    structlog.get_logger().info(log.SERVICE_READY, address="a")
    file.close()

    assert json.loads(stderr.getvalue())["address"] == "a"


class Hostile:
    def __repr__(self) -> str:
        raise RuntimeError("not even a name")


@pytest.mark.parametrize(
    "value",
    [
        *(float("nan"), float("inf"), 1 << 200, b"\xff", "\ud800", "\x1b[2J\x9b\u202e", {1, 2}, object()),
        *({1: 2, (3, 4): 5}, {float("nan"): 1}, "x" * (2 << 20)),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_every_value_makes_a_line_of_json_that_a_terminal_does_not_obey(tmp_path: Path, value: Any) -> None:
    file = configured(tmp_path)
    structlog.get_logger().info(log.SERVICE_READY, value=value)
    file.close()
    raw = (tmp_path / "index-i.jsonl").read_bytes()
    assert all(0x20 <= byte < 0x7F or byte == 0x0A for byte in raw)
    [line] = lines(tmp_path / "index-i.jsonl")
    assert (line["event"], line["service"]) == ("service.ready", "index")
    assert "value" in line or "too_long" in line


def test_a_value_that_cannot_be_told_costs_itself_only(tmp_path: Path) -> None:
    file = configured(tmp_path)
    circle: list[Any] = []
    circle.append(circle)
    structlog.get_logger().info(log.ENGINE_JOINED, value=Hostile())
    structlog.get_logger().info(log.ENGINE_LEFT, value=circle)
    try:
        raise ValueError(Hostile())
    except ValueError:
        structlog.get_logger().exception(log.BUS_HANDLER_FAILED)
    structlog.get_logger().info(log.SERVICE_READY)
    file.close()
    assert [line["event"] for line in lines(tmp_path / "index-i.jsonl")] == [
        *("engine.joined", "engine.left", "bus.handler_failed", "service.ready")
    ]


def test_a_directory_that_can_never_be_one_is_a_wrong_setting(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"log\.dir") as caught:
        configured(tmp_path / "file")
    assert caught.value.field == "log.dir"


def test_level_and_bounds_change_and_the_file_is_opened_anew(tmp_path: Path) -> None:
    file, logger = configured(tmp_path), structlog.get_logger()
    logger.debug(log.KV_RECEIVED)
    logger.info(log.SERVICE_READY)
    assert file.flush()
    os.rename(tmp_path / "index-i.jsonl", tmp_path / "moved")
    file.reconfigure(LogSettings(dir=str(tmp_path), level="debug"))
    logger.debug(log.KV_RECEIVED)
    file.close()
    assert [line["event"] for line in lines(tmp_path / "moved")] == ["service.ready"]
    assert [line["event"] for line in lines(tmp_path / "index-i.jsonl")] == ["kv.received"]


def test_a_file_beyond_its_size_is_moved_aside_between_two_lines_and_the_oldest_goes(tmp_path: Path) -> None:
    file, logger = configured(tmp_path, max_mb=1, keep=2), structlog.get_logger()
    for number in range(5000):
        logger.info(log.REQUEST_FINISHED, number=number, padding="x" * 1000)
        if number % 500 == 0:
            assert file.flush()
    file.close()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["index-i.jsonl", "index-i.jsonl.1", "index-i.jsonl.2"]
    assert all(path.stat().st_size <= 1 << 20 for path in tmp_path.iterdir())
    numbers = [line["number"] for name in reversed(names) for line in lines(tmp_path / name)]
    assert numbers == list(range(numbers[0], 5000))


def test_a_file_that_ends_within_a_line_is_gone_on_with_in_the_next(tmp_path: Path) -> None:
    (tmp_path / "index-i.jsonl").write_bytes(b'{"event": "cut')
    file = configured(tmp_path)
    structlog.get_logger().info(log.SERVICE_READY)
    file.close()
    first, second = (tmp_path / "index-i.jsonl").read_text().splitlines()
    assert first == '{"event": "cut'
    assert json.loads(second)["event"] == "service.ready"


def test_a_file_that_was_deleted_is_made_anew(tmp_path: Path) -> None:
    file = configured(tmp_path)
    structlog.get_logger().info(log.SERVICE_STARTED)
    assert file.flush()
    (tmp_path / "index-i.jsonl").unlink()
    structlog.get_logger().info(log.SERVICE_READY)
    file.close()
    assert [line["event"] for line in lines(tmp_path / "index-i.jsonl")] == ["service.ready"]


def test_refusals_are_sampled_and_what_was_left_out_is_counted(tmp_path: Path) -> None:
    file, logger = configured(tmp_path, max_refusals_per_s=3), structlog.get_logger()
    for _ in range(1000):
        logger.info(log.HTTP_REJECTED, status=401, code="invalid_api_key")
    logger.info(log.HTTP_REJECTED, status=404, code="not_found")
    for _ in range(100):
        logger.info(log.REQUEST_FINISHED, status=404, code="model_not_found")
        logger.info(log.REQUEST_FINISHED, status=200, code="")
    file.close()
    found = lines(tmp_path / "index-i.jsonl")
    written = [(line["event"], line["status"]) for line in found if line["event"] != "log.sampled"]
    told = {
        (line["of"], line["status"]): line["left_out"] for line in found if line["event"] == "log.sampled"
    }
    assert sum(told.values()) == file.left_out
    for key, count in {("http.rejected", 401): 1000, ("request.finished", 404): 100}.items():
        assert written.count(key) + told[key] == count
        assert written.count(key) <= 6, "two seconds' worth at most"
    assert written.count(("http.rejected", 404)) == 1
    assert written.count(("request.finished", 200)) == 100


def test_lines_for_journald_carry_its_priority(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with open(tmp_path / "journal", "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        status, true_fstat = os.fstat(stderr.fileno()), os.fstat
        monkeypatch.setattr(os, "fstat", lambda fd: status if fd == 2 else true_fstat(fd))
        monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
        file = configure("index", "i")
        for tell in (
            structlog.get_logger().info,
            structlog.get_logger().warning,
            structlog.get_logger().error,
        ):
            tell(log.SERVICE_READY)
        file.close()
    assert [line[:4] for line in (tmp_path / "journal").read_text().splitlines()] == ["<6>{", "<4>{", "<3>{"]
