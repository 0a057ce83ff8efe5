"""What keeps a service alive goes on whatever goes wrong in one turn of it, for one request or one peer.

Owns the one way to say so: the failure is logged with its place and its cause, and ends there. For
heartbeats, looks for the silent, and tasks of single requests and peers in a group that would end with them.
"""

from __future__ import annotations

from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

import structlog

from microserve.protocol import log

_logger = structlog.get_logger()


@contextmanager
def surviving(what: str, **whom: object) -> Iterator[None]:
    """``what`` failed, for ``whom``: logged as ``turn.failed``, and over. Cancellation passes."""
    try:
        yield
    except Exception as error:
        _logger.exception(log.TURN_FAILED, what=what, error=str(error) or type(error).__name__, **whom)


async def survive(work: Coroutine[Any, Any, object], what: str, **whom: object) -> None:
    """Await it, as :func:`surviving`."""
    with surviving(what, **whom):
        await work
