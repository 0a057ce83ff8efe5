"""A store that fails keeps nobody waiting: what cannot be kept is not, and it is said once."""

from __future__ import annotations

import asyncio
import gc
import threading
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from microserve.gateway.kept import store as stores
from microserve.gateway.kept.shelf import Bounds, Shelf
from microserve.gateway.kept.store import MAX_HELD_NBYTES, Store
from microserve.protocol import log
from microserve.protocol.errors import CapacityError
from tests.support.gateway.gateway_world import run

BOUNDS = Bounds(1 << 20, 100, 1000.0)


def clock() -> float:
    return 5000.0


def test_what_is_put_is_found_by_its_owner_until_it_is_deleted(tmp_path: Path) -> None:
    async def main() -> None:
        store = Store(str(tmp_path / "kept.db"), BOUNDS, clock)
        assert await store.put("a", "x", b"1")
        assert await store.get("a", "x") == b"1"
        assert await store.get("b", "x") is None
        assert not await store.delete("b", "x")
        assert await store.delete("a", "x")
        assert await store.get("a", "x") is None
        await store.put("a", "x", b"2")
        await store.close()
        again = Store(str(tmp_path / "kept.db"), BOUNDS, clock)
        assert await again.get("a", "x") == b"2", "it outlives the process"
        await again.close()

    run(main())


def test_a_disk_that_fails_is_told_once_and_comes_back(tmp_path: Path) -> None:
    async def main() -> None:
        store = Store(str(tmp_path / "later" / "kept.db"), BOUNDS, clock)
        with capture_logs() as lines:
            for _ in range(3):
                assert not await store.put("a", "x", b"1")
                with pytest.raises(CapacityError):
                    await store.get("a", "x")
        assert [line["event"] for line in lines] == [log.KEPT_FAILED]
        (tmp_path / "later").mkdir()
        assert await store.put("a", "x", b"1")
        assert await store.get("a", "x") == b"1"
        await store.close()

    run(main())


def test_who_is_gone_while_a_disk_fails_leaves_no_complaint(tmp_path: Path) -> None:
    async def main() -> None:
        complaints: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))
        store = Store(str(tmp_path / "later" / "kept.db"), BOUNDS, clock)
        asking = asyncio.create_task(store.put("a", "x", b"1"))
        await asyncio.sleep(0)  # it has been handed to the thread
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await store.close()
        del asking
        gc.collect()
        assert (complaints, store._waiting) == ([], 0)

    run(main())


def test_a_disk_that_stands_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither does what waits for it grow without an end."""
    monkeypatch.setattr(stores, "WAIT_S", 0.01)
    monkeypatch.setattr(stores, "MAX_WAITING", 2)
    standing = threading.Event()

    def put(self: Shelf, owner: str, name: str, data: bytes, now: float) -> None:
        standing.wait(30.0)

    async def main() -> None:
        store = Store(str(tmp_path / "kept.db"), BOUNDS, clock)
        with monkeypatch.context() as patch, capture_logs() as lines:
            patch.setattr(Shelf, "put", put)
            for _ in range(4):
                assert not await store.put("a", "x", b"1")
            assert store._waiting == 2
        assert [line["event"] for line in lines] == [log.KEPT_FAILED]
        standing.set()
        monkeypatch.setattr(stores, "WAIT_S", 30.0)
        monkeypatch.setattr(stores, "MAX_WAITING", 9)
        assert await store.get("b", "x") is None
        assert store._waiting == 0
        await store.close()

    run(main())


def test_what_waits_for_its_answer_is_bounded(tmp_path: Path) -> None:
    async def main() -> None:
        store = Store(str(tmp_path / "kept.db"), BOUNDS, clock)
        assert store.hold(MAX_HELD_NBYTES - 1) and store.hold(1)
        assert not store.hold(1)
        store.give_back(1)
        assert store.hold(1)
        await store.close()

    run(main())
