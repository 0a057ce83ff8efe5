"""One of several processes of a gateway (``gateway.workers``): its own settings, made of the whole gateway's.

Owns what is each worker's and what is divided among them. Who starts them is services/local's, that they
share a port the socket's (``http/server.py``), what they say together ``siblings.py``'s.
"""

from __future__ import annotations

import secrets

import msgspec

from microserve.protocol.errors import ConfigError
from microserve.protocol.settings.settings import Settings


def settings_of_worker(settings: Settings, number: int) -> Settings:
    """For worker ``number``, from 0 on: a name of its own, and its part of what bounds the gateway's memory
    and descriptors. Limits of keys stay: a client's connection, and so its limits, are one worker's.

    Raises :class:`ConfigError` for a number that none has."""
    gateway, count = settings.gateway, settings.gateway.workers
    if not 0 <= number < count:
        raise ConfigError(
            f"there is no worker {number} of gateway.workers = {count}", field="gateway.workers"
        )
    return msgspec.structs.replace(
        settings,
        gateway=msgspec.structs.replace(
            gateway,
            id=f"{gateway.id or 'g-' + secrets.token_hex(3)}-{number}",
            max_streams=share(gateway.max_streams, count),
            max_connections=share(gateway.max_connections, count),
        ),
    )


def share(total: int, count: int) -> int:
    """One of ``count`` equal parts, all of which together are no less than ``total``."""
    return -(-total // count)
