"""What ``microserve gateway`` is: all of a gateway, one worker of it, or the process above its workers."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from microserve.services.command.flags import Flags, WrongFlag

if TYPE_CHECKING:
    from microserve.protocol.process.run import Serve
    from microserve.protocol.settings import Settings


def settings_of(flags: Flags, worker: int | None) -> Settings:
    """As ``flags`` say, of worker number ``worker`` if it is one. Raises :class:`WrongFlag`."""
    from microserve.protocol.errors import ConfigError
    from microserve.protocol.process.run import identify

    settings = flags.load()
    if worker is not None:
        from microserve.gateway.worker import settings_of_worker

        try:
            settings = settings_of_worker(settings, worker)
        except ConfigError as error:
            raise WrongFlag(str(error)) from None
    return identify("gateway", settings)[1]


def load(flags: Flags, settings: Settings, worker: int | None) -> Serve:
    """What is to be run; imports it."""
    if worker is None and settings.gateway.workers > 1:
        from microserve.services.local.gateway_workers import run_workers

        return partial(run_workers, flags=flags.as_arguments())
    from microserve.gateway.server import run_gateway

    return partial(run_gateway, worker=worker)
