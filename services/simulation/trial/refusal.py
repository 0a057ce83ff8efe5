"""What is refused while a strategy is tried: calls that stop the whole router, wherever they hide.

The process is one for a single check (check_process.py), so that much may be changed in it. What is refused
raises at the author's line. Reading a source finds most of them; what a library does for it comes here.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from microserve.services.router.oversight.cut import Kind, kind

BLOCKING = frozenset(
    {
        *(
            "socket.connect",
            "socket.getaddrinfo",
            "socket.gethostbyname",
            "urllib.Request",
            "sqlite3.connect",
        ),
        *("subprocess.Popen", "os.system", "os.posix_spawn", "os.spawn", "builtins.input", "open"),
    }
)
"""Audit events of Python."""
LOADING = ("<frozen importlib._bootstrap>", "<frozen importlib._bootstrap_external>")


class NotSoHere(Exception):
    """What it did stops a router."""


class Refusals:
    """``begin`` when the source has been loaded: what is read then is read once."""

    def __init__(self) -> None:
        self._is_on = False

    def begin(self) -> None:
        module: Any = time
        module.sleep = _refuse_sleep(time.sleep)
        sys.addaudithook(self._audit)
        self._is_on = True

    def _audit(self, event: str, _arguments: Any) -> None:
        if (
            event not in BLOCKING
            or not self._is_on
            or threading.current_thread() is not threading.main_thread()
        ):
            return
        if _is_the_authors(sys._getframe(1)):
            mend = "do it when the source is loaded, or by `await asyncio.to_thread(...)` in the plan"
            raise NotSoHere(f"`{event}` stops the whole router while it waits: {mend}")


def _refuse_sleep(sleep: Callable[[float], None]) -> Callable[[float], None]:
    """Of the router's thread; those beside it may."""

    def refuse(seconds: float) -> None:
        if threading.current_thread() is threading.main_thread():
            raise NotSoHere("`time.sleep` stops the whole router: `await asyncio.sleep(...)` instead")
        sleep(seconds)

    return refuse


def _is_the_authors(frame: FrameType | None) -> bool:
    """A strategy's code has called this, by libraries alone; not the router, nor Python to load a module, nor
    the strategy's own modules while they are loaded."""
    is_theirs = False
    while frame is not None:
        found, code = kind(frame), frame.f_code
        if code.co_filename in LOADING or (found is Kind.THEIRS and code.co_name == "<module>"):
            return False
        if found in (Kind.OURS, Kind.READER, Kind.OVERSEER):
            break
        is_theirs = is_theirs or found is Kind.THEIRS
        frame = frame.f_back
    return is_theirs
