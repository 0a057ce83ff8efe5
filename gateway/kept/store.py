"""The shelf for a loop: a thread of its own, bounded waits, and what is told when it fails.

An answer is never lost for it: what cannot be put is not kept, and the log says so once. What cannot be
looked for is a 503.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import structlog

from microserve.gateway.kept.shelf import Bounds, Shelf
from microserve.protocol import log
from microserve.protocol.errors import CapacityError

WAIT_S = 3.0
"""Longest wait for one entry to be put or found."""
MAX_WAITING = 256
MAX_WAITING_NBYTES = 64 << 20
"""Of what is still to be put, where the disk is slow: beyond it nothing more is taken."""
MAX_HELD_NBYTES = 256 << 20
"""Of what is to be kept with answers that are being made."""

T = TypeVar("T")
_logger = structlog.get_logger()


class Store:
    """One per gateway process; make it inside the loop, and ``close`` it."""

    def __init__(self, path: str, bounds: Bounds, clock: Callable[[], float]) -> None:
        """``clock``: seconds since 1970, as other gateways have them."""
        self._path = Path(path)
        self._bounds = bounds
        self._clock = clock
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kept")
        self._shelf: Shelf | None = None
        self._waiting = 0
        self._waiting_nbytes = 0
        self._held_nbytes = 0
        self._is_failing = False

    def hold(self, nbytes: int) -> bool:
        """Whether there is room for so much more, until :meth:`give_back`; else its answer is not kept."""
        if self._held_nbytes + nbytes > MAX_HELD_NBYTES:
            return False
        self._held_nbytes += nbytes
        return True

    def give_back(self, nbytes: int) -> None:
        self._held_nbytes -= nbytes

    async def put(self, owner: str, name: str, data: bytes) -> bool:
        """Whether it is kept now."""
        try:
            await self._run(lambda shelf: shelf.put(owner, name, data, self._clock()), len(data))
        except CapacityError:
            return False
        return True

    async def get(self, owner: str, name: str) -> bytes | None:
        """None: there is none, or it is another one's. Raises :class:`CapacityError`."""
        return await self._run(lambda shelf: shelf.get(owner, name, self._clock()))

    async def delete(self, owner: str, name: str) -> bool:
        """Whether it was there. Raises :class:`CapacityError`."""
        return await self._run(lambda shelf: shelf.delete(owner, name))

    async def _run(self, work: Callable[[Shelf], T], nbytes: int = 0) -> T:
        if self._waiting >= MAX_WAITING or self._waiting_nbytes + nbytes > MAX_WAITING_NBYTES:
            raise self._failed(f"{self._waiting} entries wait for the disk")
        self._waiting += 1
        self._waiting_nbytes += nbytes
        done = asyncio.get_running_loop().run_in_executor(self._thread, self._do, work)
        done.add_done_callback(lambda _: self._over(nbytes))
        done.add_done_callback(_seen)  # whoever waits may be cancelled
        try:
            async with asyncio.timeout(WAIT_S):
                found = await asyncio.shield(done)
        except TimeoutError:
            raise self._failed(f"the disk takes longer than {WAIT_S:.0f} s") from None
        except (OSError, sqlite3.Error) as error:
            raise self._failed(str(error)) from None
        self._is_failing = False
        return found

    def _do(self, work: Callable[[Shelf], T]) -> T:
        """In the thread. After a failure the file is opened anew: the fault may have been another one's."""
        try:
            if self._shelf is None:
                self._shelf = Shelf(self._path, self._bounds)
            return work(self._shelf)
        except BaseException:
            self._close()
            raise

    def _over(self, nbytes: int) -> None:
        self._waiting -= 1
        self._waiting_nbytes -= nbytes

    def _failed(self, why: str) -> CapacityError:
        if not self._is_failing:
            self._is_failing = True
            _logger.error(log.KEPT_FAILED, path=str(self._path), error=why)
        return CapacityError("what is kept cannot be reached now", retry_after_s=1.0)

    def _close(self) -> None:
        shelf, self._shelf = self._shelf, None
        if shelf is not None:
            shelf.close()

    async def close(self) -> None:
        """What waits is written, if that can be done soon."""
        last = asyncio.get_running_loop().run_in_executor(self._thread, self._close)
        await asyncio.wait([last], timeout=WAIT_S)
        self._thread.shutdown(wait=False, cancel_futures=True)


def _seen(done: asyncio.Future[T]) -> None:
    """Where nobody waits for it any more, how it has failed is no news."""
    if not done.cancelled():
        done.exception()
