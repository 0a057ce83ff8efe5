"""An index whose disk is full when it starts waits for room, unless its log is there already."""

from __future__ import annotations

import asyncio
import errno
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from microserve.protocol import log
from microserve.protocol.messages.strategy.control import PUBLISH, Change
from microserve.services.index import control_log
from microserve.services.index.control_log import ControlLog
from tests.support.process.descriptors import no_descriptors

TIMEOUT_S = 20.0


@contextmanager
def no_room() -> Iterator[None]:
    """No file of this process may grow: what SQLite sees of a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture
def path(tmp_path: Path) -> str:
    """Of a log with one change."""
    made = ControlLog(str(tmp_path / "control.db"))
    made.append(Change(1, "id", PUBLISH, "s", "source"), "who")
    made.close()
    return str(tmp_path / "control.db")


def test_a_lack_is_told_from_a_wrong_setting(path: str) -> None:
    with no_room(), pytest.raises(OSError, match="control log"):
        ControlLog(f"{path}.new")
    with no_room():  # what is there can be read
        known = ControlLog(path)
    assert known.fold.version == 1
    known.close()
    with no_descriptors(), pytest.raises(OSError, match="control log") as caught:
        ControlLog(path)
    assert caught.value.errno == errno.EMFILE
    opened = ControlLog(path)
    assert opened.fold.version == 1
    opened.close()


def test_the_index_waits_for_room_and_says_so_once(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_log, "RETRY_S", 0.01)

    async def test() -> ControlLog:
        with no_room(), capture_logs() as events:
            opening = asyncio.create_task(control_log.open_control_log(f"{path}.new"))
            await asyncio.sleep(0.1)
            assert not opening.done()
        assert [event["event"] for event in events] == [log.CONTROL_AWAITED]
        return await asyncio.wait_for(opening, TIMEOUT_S)

    opened = asyncio.run(test())
    assert opened.append(Change(2, "other", PUBLISH, "s", "newer"), "who") == 1
    opened.close()
