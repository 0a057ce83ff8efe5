"""Waiting for the end of a child process (Linux), with a descriptor where there is one to be had.

Owns the wait; reaping is the caller's.
"""

from __future__ import annotations

import asyncio
import os

POLL_S = 0.1
"""Between two looks at a child for which there is no descriptor to wait on."""


async def wait_exit(pid: int) -> None:
    """Return when the process has exited; it is left for the caller to reap."""
    loop = asyncio.get_running_loop()
    exited = asyncio.Event()
    try:
        descriptor = os.pidfd_open(pid)
    except OSError:  # none is to be had
        while not _has_exited(pid):  # noqa: ASYNC110  (an event would need the descriptor)
            await asyncio.sleep(POLL_S)
        return
    try:
        loop.add_reader(descriptor, exited.set)
        await exited.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


def _has_exited(pid: int) -> bool:
    """Of a child; leaves it to be reaped."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
