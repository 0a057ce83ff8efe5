"""Calls that wait for their answer: call ids, futures and deadlines of one connection."""

from __future__ import annotations

import asyncio
import copy
import itertools
from typing import Generic, TypeVar

from microserve.protocol.errors import DeadlineExceeded, MeshError

T = TypeVar("T")


class Calls(Generic[T]):
    """Pending calls of one connection. Every call ends: by answer, failure, deadline or loss of the peer."""

    def __init__(self, peer: str) -> None:
        self._peer = peer
        self._ids = itertools.count(1)
        self._pending: dict[int, asyncio.Future[T]] = {}

    def __len__(self) -> int:
        return len(self._pending)

    def next_id(self) -> int:
        return next(self._ids)

    def open(self, call_id: int) -> asyncio.Future[T]:
        """Expect an answer. Call before sending, so that no answer can come too early."""
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._pending[call_id] = future
        return future

    async def wait(self, call_id: int, future: asyncio.Future[T], timeout_s: float) -> T:
        """The answer; raises :class:`DeadlineExceeded` after ``timeout_s``, or what ``fail`` was given."""
        try:
            async with asyncio.timeout(timeout_s):
                return await future
        except TimeoutError:
            raise DeadlineExceeded(f"{self._peer} did not answer within {timeout_s:.3f} s") from None
        finally:
            self._pending.pop(call_id, None)

    def resolve(self, call_id: int, answer: T) -> bool:
        """False if nobody waits (any more): a late answer is not an error."""
        future = self._pending.pop(call_id, None)
        if future is None or future.done():
            return False
        future.set_result(answer)
        return True

    def fail(self, call_id: int, error: MeshError) -> bool:
        future = self._pending.pop(call_id, None)
        if future is None or future.done():
            return False
        future.set_exception(error)
        return True

    def fail_all(self, error: MeshError) -> None:
        """The peer is lost: nobody may wait for it any longer."""
        for call_id in list(self._pending):
            # One of its own for each: a raised exception collects its waiter's traceback.
            self.fail(call_id, copy.copy(error))
