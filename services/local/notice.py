"""What children say of themselves to who started them: sd_notify's lines over a datagram socket (Linux).

Owns the socket, the proof of who speaks (the kernel names each sender), and who has been silent for too long.
Needs no log and no disk: who cannot write a line is ready all the same. Does not know what the lines mean.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
import struct
from collections.abc import Callable, Mapping

import msgspec

MAX_NBYTES = 4096
_CREDENTIALS = struct.Struct("3i")
"""struct ucred: pid, uid, gid."""

OnNotice = Callable[[int, Mapping[str, str]], None]
"""Process id of the sender, and its ``NAME=value`` lines."""


class NoticeSocket:
    """Make it inside the running loop; ``close`` it."""

    def __init__(self, on_notice: OnNotice) -> None:
        self._on_notice = on_notice
        self._loop = asyncio.get_running_loop()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            self._socket.setblocking(False)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            # In the abstract namespace: it needs no room on a disk and leaves nothing behind.
            self.address = f"@microserve-{secrets.token_hex(16)}"
            self._socket.bind("\0" + self.address[1:])
        except BaseException:
            self._socket.close()
            raise
        self._loop.add_reader(self._socket.fileno(), self.drain)

    def drain(self) -> None:
        """Hand over all that has come; also of a process that has ended since."""
        while True:
            try:
                data, ancillary, _, _ = self._socket.recvmsg(MAX_NBYTES, socket.CMSG_SPACE(_CREDENTIALS.size))
            except OSError:  # nothing more; or no memory for it now
                return
            for level, kind, content in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
                    pid, _, _ = _CREDENTIALS.unpack(content[: _CREDENTIALS.size])
                    self._on_notice(pid, _fields(data))

    def close(self) -> None:
        self._loop.remove_reader(self._socket.fileno())
        self._socket.close()


def facts_of(text: str) -> Mapping[str, str]:
    """``X_FACTS`` of a child: names and values; of what is none, none."""
    try:
        return msgspec.json.decode(text, type=dict[str, str]) if text else {}
    except msgspec.DecodeError:
        return {}


class Silence:
    """Who has said nothing for too long. Sans-I/O: time comes in.

    Who did not listen cannot say that another was silent: when the looks themselves came late (everything was
    stopped, the machine stood still), all get their whole time again.
    """

    LOOKS = 6
    """In the shortest time for which anyone may be silent."""

    def __init__(self) -> None:
        self._limits_s: dict[int, float] = {}
        self._heard_at: dict[int, float] = {}
        self._looked_at = 0.0

    @property
    def look_s(self) -> float:
        """Time between two looks."""
        return min(self._limits_s.values(), default=self.LOOKS) / self.LOOKS

    def expect(self, pid: int, limit_s: float, now: float) -> None:
        """From now on it may be silent for ``limit_s`` at most; 0: for ever."""
        if limit_s > 0.0:
            if not self._limits_s:
                self._looked_at = now
            self._limits_s[pid], self._heard_at[pid] = limit_s, now

    def hear(self, pid: int, now: float) -> None:
        if pid in self._heard_at:
            self._heard_at[pid] = now

    def forget(self, pid: int) -> None:
        self._limits_s.pop(pid, None)
        self._heard_at.pop(pid, None)

    def look(self, now: float) -> list[int]:
        """Who has been silent for longer than it may; call every ``look_s``, after all that has come."""
        was_away = now - self._looked_at > 2 * self.look_s
        self._looked_at = now
        if was_away:
            self._heard_at = dict.fromkeys(self._heard_at, now)
        return [pid for pid, at in self._heard_at.items() if now - at > self._limits_s[pid]]


def _fields(data: bytes) -> dict[str, str]:
    lines = data.decode(errors="replace").splitlines()
    return {name: value for name, equals, value in (line.partition("=") for line in lines) if equals}
