"""What keeps a service alive goes on whatever goes wrong in one turn of it, for one request or one peer.

Owns the one way to say so: the failure is logged with its place and its cause, and ends there. For
heartbeats, looks for the silent, and tasks of single requests and peers in a group that would end with them.
"""

from __future__ import annotations

from collections.abc import Coroutine
from types import TracebackType
from typing import Any

import structlog

from microserve.protocol import log

_logger = structlog.get_logger()


class surviving:
    """``what`` failed, for ``whom``: logged as ``turn.failed``, and over. Cancellation passes."""

    __slots__ = ("_what", "_whom")

    def __init__(self, what: str, **whom: object) -> None:
        self._what = what
        self._whom = whom

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception):
            return False
        told = str(error) or type(error).__name__
        _logger.error(log.TURN_FAILED, what=self._what, error=told, **self._whom, exc_info=error)
        return True


async def survive(work: Coroutine[Any, Any, object], what: str, **whom: object) -> None:
    """Await it, as :func:`surviving`."""
    with surviving(what, **whom):
        await work
