"""What systemd is told: READY, STATUS, WATCHDOG and STOPPING over ``NOTIFY_SOCKET`` (sd_notify(3)).

Owns the datagram; knows nothing of services. Without a supervisor every call is a no-op.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Mapping


class Notifier:
    """Speaks to one notification socket; the empty address means that nobody listens."""

    def __init__(self, address: str = "", *, watchdog_s: float = 0.0) -> None:
        """``address``: a path, or ``@name`` in the abstract namespace. ``watchdog_s``: 0 for no pings."""
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self.watchdog_s = watchdog_s

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Notifier:
        """``NOTIFY_SOCKET``, and ``WATCHDOG_USEC`` unless ``WATCHDOG_PID`` names another process."""
        microseconds = environment.get("WATCHDOG_USEC", "")
        meant = environment.get("WATCHDOG_PID", "") in ("", str(os.getpid()))
        watchdog_s = int(microseconds) / 1e6 if microseconds.isdecimal() and meant else 0.0
        return cls(environment.get("NOTIFY_SOCKET", ""), watchdog_s=watchdog_s)

    def send(self, *lines: str) -> bool:
        """One datagram of ``NAME=value`` lines. False if nobody listens, which is no error."""
        if not self._address:
            return False
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            channel.setblocking(False)  # a full queue must not stop the event loop
            channel.connect(self._address)
            channel.send("\n".join(lines).encode())
            return True
        return False
