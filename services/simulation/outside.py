"""What an event loop has beside time: threads and other programs, as far as a simulated mesh has any.

Owns what becomes of an author's ``asyncio.to_thread`` (it has ended before anything else happens and takes no
virtual time, so a run stays a function of its inputs) and of who looks for a network: there is none. Knows
no time and no processes.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NoReturn

NOTHING_OUTSIDE = "a simulation has no network and no other programs"


class Outside:
    """Of an event loop."""

    def run_in_executor(
        self, executor: object, function: Callable[..., Any], *args: Any
    ) -> asyncio.Future[Any]:
        """``executor`` is nobody's: each call has a thread of its own."""
        done: Future[Any] = Future()

        def work() -> None:
            try:
                done.set_result(function(*args))
            except BaseException as error:  # whoever waits for it is told
                done.set_exception(error)

        thread = threading.Thread(target=work, name="beside a simulation", daemon=True)
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        thread.start()
        # Not here: who asks for it, a strategy's plan say, does not hold its router meanwhile.
        loop.call_soon(_settle, future, thread, done)
        return future

    async def _refuse(self, *args: Any, **options: Any) -> NoReturn:
        raise OSError(NOTHING_OUTSIDE)

    create_connection = create_unix_connection = create_datagram_endpoint = _refuse
    create_server = create_unix_server = getaddrinfo = getnameinfo = _refuse
    sock_connect = subprocess_exec = subprocess_shell = _refuse


def _settle(future: asyncio.Future[Any], thread: threading.Thread, done: Future[Any]) -> None:
    thread.join()
    if future.done():  # nobody waits any more
        return
    error = done.exception()
    if error is None:
        future.set_result(done.result())
    else:
        future.set_exception(error)
