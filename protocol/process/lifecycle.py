"""How a service tells the world that it is up and well, whoever supervises it.

Owns readiness, the health question and the status line of one process; does not know which service it is.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping

import structlog

from microserve.protocol import log
from microserve.protocol.process.notify import Notifier
from microserve.protocol.settings.settings import Settings

_logger = structlog.get_logger()


class Lifecycle:
    """Handed to every ``run_X(settings, bus, lifecycle)``; ``Lifecycle()`` alone reports to nobody."""

    def __init__(self, notifier: Notifier | None = None) -> None:
        self._notifier = notifier or Notifier()
        self._health: Callable[[], bool] = lambda: True
        self._on_reload: list[Callable[[Settings], None]] = []
        self._ready = asyncio.Event()
        self.address = ""
        self.skips_exit_handlers = False
        """The process is to end as soon as its log is written: a library in it could wait for other processes
        in a handler or a thread, for ever."""

    def ready(self, address: str, *, about: str = "", facts: Mapping[str, str] | None = None) -> None:
        """The service answers at ``address``: logged as ``service.ready``, told to systemd, once. ``about``:
        what else ``ps`` is to show of it, in a few words; ``facts``: the same by name, for ``ps --json``."""
        if self._ready.is_set():
            return
        self.address = address
        _logger.info(log.SERVICE_READY, address=address, **({"about": about} if about else {}))
        status = f"STATUS=ready at {address}" + (f", {about}" if about else "")
        more = [f"X_ABOUT={about}"] if about else []
        more += [f"X_FACTS={json.dumps(dict(facts))}"] if facts else []
        self._notifier.send("READY=1", status, f"X_ADDRESS={address}", *more)
        self._ready.set()

    async def wait_ready(self) -> str:
        """Wait for :meth:`ready`; returns the address."""
        await self._ready.wait()
        return self.address

    def set_health(self, healthy: Callable[[], bool]) -> None:
        """``healthy`` is asked from the loop, often, and must be quick; False withholds the watchdog's ping.

        It should speak of progress (steps advance or there is no work), not of the process being alive.
        """
        self._health = healthy

    def healthy(self) -> bool:
        return self._health()

    def on_reload(self, take: Callable[[Settings], None]) -> None:
        """``take`` gets the settings as they are now whenever the process is told to read them again
        (SIGHUP); it takes over what can be changed while it serves. What it raises is logged."""
        self._on_reload.append(take)

    def reload(self, settings: Settings) -> None:
        """Tell all who have asked; the failure of one keeps it from no other."""
        for take in self._on_reload:
            try:
                take(settings)
            except Exception as error:
                _logger.exception(log.SETTINGS_REJECTED, error=str(error))

    def status(self, text: str) -> None:
        """One line for ``systemctl status``."""
        self._notifier.send(f"STATUS={text}")
