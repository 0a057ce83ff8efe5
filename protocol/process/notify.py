"""What systemd is told: READY, STATUS, WATCHDOG and STOPPING over ``NOTIFY_SOCKET`` (sd_notify(3)).

Owns the datagram; knows nothing of services. Without a supervisor every call is a no-op.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping


class Notifier:
    """Speaks to one notification socket; the empty address means that nobody listens. ``close`` it."""

    def __init__(self, address: str = "", *, watchdog_s: float = 0.0) -> None:
        """``address``: a path, or ``@name`` in the abstract namespace. ``watchdog_s``: 0 for no pings."""
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self.watchdog_s = watchdog_s
        self._channel: socket.socket | None = None

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
        try:
            channel = self._channel or self._connect()
            channel.send("\n".join(lines).encode())
        except BlockingIOError:
            return False
        except OSError:
            self.close()
            return False
        return True

    def _connect(self) -> socket.socket:
        """Kept from the first word on: who needs a descriptor each time falls silent when there is none."""
        channel = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            channel.setblocking(False)  # a full queue must not stop the event loop
            channel.connect(self._address)
        except BaseException:
            channel.close()
            raise
        self._channel = channel
        return channel

    def close(self) -> None:
        """The next word opens it again."""
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()
