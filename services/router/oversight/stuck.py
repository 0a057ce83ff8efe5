"""What a router leaves behind that cannot go on: where it stood, so that its next life keeps away from that.

Code in C that never asks for signals (``sum(range(10**12))``) cannot be ended from within; a watchdog outside
kills the process, and the next one would load the same version and stand still again. So a thread that needs
no interpreter (faulthandler's) writes down where the main thread stands when nothing has come from it for
``STUCK_S``. Whoever goes on after all, as after SIGCONT, wipes it out. Where the process stood when it
crashed (a fault in a library, a stack that overflowed, of which the innermost hundred frames are told and may
all be a library's) is there, too. Owns that file; knows no strategy.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import re

STUCK_S = 3.0
AGAIN_S = 1.0
"""Call :meth:`StuckTrace.alive` so often."""
MAX_NBYTES = 1 << 20
_FRAME = re.compile(rb'^  File "(.+)", line \d+ in ', re.MULTILINE)


class StuckTrace:
    """For one process at a time; ``close`` it."""

    def __init__(self, path: str) -> None:
        """Raises ``OSError`` when the file cannot be had."""
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self.culprits = _files(os.pread(self._file, MAX_NBYTES, 0))
        """Source files of which code ran when the life before stood still or crashed; empty if it did not."""
        self._wipe()
        faulthandler.enable(self._file, all_threads=False)

    def alive(self) -> None:
        """The main thread is: from now on it has its whole time again."""
        faulthandler.dump_traceback_later(STUCK_S, file=self._file)
        if os.fstat(self._file).st_size:
            self._wipe()

    def close(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        faulthandler.disable()
        self._wipe()
        os.close(self._file)

    def _wipe(self) -> None:
        with contextlib.suppress(OSError):
            os.ftruncate(self._file, 0)
            os.lseek(self._file, 0, os.SEEK_SET)


def _files(trace: bytes) -> frozenset[str]:
    return frozenset(name.decode(errors="replace") for name in _FRAME.findall(trace))
