"""``sd_notify``: tells systemd (``Type=notify``) the state of this process; nothing happens outside systemd.

Owns one datagram socket for as long as a message takes. The environment is handed in, never read here.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping


class Notifier:
    """Sends ``READY=1``, ``STOPPING=1``, ``WATCHDOG=1`` to ``NOTIFY_SOCKET``, where there is one."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        path = environment.get("NOTIFY_SOCKET", "")
        # A leading @ stands for the NUL byte of Linux's abstract namespace.
        self._address = "\0" + path[1:] if path.startswith("@") else path
        self.watchdog = bool(self._address) and bool(environment.get("WATCHDOG_USEC"))

    def send(self, state: str) -> bool:
        """False when nobody listens; a supervisor's trouble never stops the service."""
        if not self._address:
            return False
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as notify_socket:
                notify_socket.sendto(state.encode(), self._address)
        except OSError:
            return False
        return True
