"""A program at a pseudo-terminal: what it shows is waited for, what it reads is typed."""

from __future__ import annotations

import asyncio
import os
import pty
import struct
import subprocess
import sys
import termios
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from fcntl import ioctl
from pathlib import Path

CONTROL_C, CONTROL_D = "\x03", "\x04"
WAIT_S = 60.0
AGAIN_S = 3.0


class NotShown(AssertionError):
    """What was expected did not come."""


class Terminal:
    def __init__(self, process: subprocess.Popen[bytes], master: int) -> None:
        self.process = process
        self.shown = b""
        """All of it."""
        self._master = master
        self._seen = 0
        self._more = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(master, self._read)
        self.is_closed = False

    def _read(self) -> None:
        try:
            data = os.read(self._master, 65536)
        except OSError:  # EIO: nobody has the other end open
            data = b""
        if not data:
            self.close()
        self.shown += data
        self._more.set()

    def close(self) -> None:
        if not self.is_closed:
            self.is_closed = True
            self._loop.remove_reader(self._master)
            os.close(self._master)

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    async def interrupt(self, text: str) -> None:
        """Ctrl-C at a prompt, until ``text`` is shown: readline takes none in the moment between its looking
        for signals and its waiting for a key."""
        async with asyncio.timeout(WAIT_S):
            while True:
                self.type(CONTROL_C)
                try:
                    return await self.expect(text, wait_s=AGAIN_S)
                except NotShown:
                    continue

    async def expect(self, text: str, *, wait_s: float = WAIT_S) -> None:
        """Until ``text`` is shown behind what was expected before."""
        wanted = text.encode()
        try:
            async with asyncio.timeout(wait_s):
                while (at := self.shown.find(wanted, self._seen)) < 0:
                    assert not self.is_closed, f"ended without {text!r}: {self.shown!r}"
                    self._more.clear()
                    await self._more.wait()
        except TimeoutError:
            raise NotShown(f"no {text!r} in {self.shown[self._seen :]!r}") from None
        self._seen = at + len(wanted)

    async def end(self) -> int:
        """Its exit code, when it has ended."""
        async with asyncio.timeout(WAIT_S):
            while not self.is_closed:
                self._more.clear()
                await self._more.wait()
            return await asyncio.to_thread(self.process.wait, WAIT_S)


TAKE_TERMINAL = (
    "import fcntl, os, sys, termios\n"
    "fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])\n"
)
"""Ctrl-C is a signal to who has the terminal."""


def start(words: tuple[str, ...], home: Path) -> Terminal:
    master, slave = pty.openpty()
    ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 200, 0, 0))
    environment = {**os.environ, "TERM": "xterm", "HOME": str(home), "XDG_STATE_HOME": str(home / "state")}
    environment.pop("NO_COLOR", None)
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", TAKE_TERMINAL, "-P", "-m", "microserve.services", *words],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        cwd=home,
        env=environment,
        start_new_session=True,
    )
    os.close(slave)
    return Terminal(process, master)


@asynccontextmanager
async def microserve_at_terminal(*words: str, home: Path) -> AsyncIterator[Terminal]:
    """``microserve ...`` with ``home`` as its home and current directory."""
    terminal = start(words, home)
    try:
        yield terminal
    finally:
        terminal.process.kill()
        terminal.process.wait()
        terminal.close()
