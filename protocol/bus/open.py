"""The bus of a process, as its settings say: sockets, keys, and whose key is expected at which address.

Owns the one way from settings to a bus, for services and commands alike. Knows addresses, and of who asks
only whether it calls routers: services may share one file of settings, and a directory of keys holds no more
than its owner's peers.
"""

from __future__ import annotations

from microserve.protocol.bus.curve import CurveKeys, peer_key
from microserve.protocol.bus.transport import ZmqBus
from microserve.protocol.errors import ConfigError
from microserve.protocol.settings import Settings


def open_bus(settings: Settings, *, calls_routers: bool = False) -> ZmqBus:
    """Make it in the running loop, and close it. ``calls_routers``: gateways do.

    Raises :class:`ConfigError` for keys of no use."""
    directory = settings.bus.curve_dir
    keys = CurveKeys.load(directory, _servers(settings, calls_routers)) if directory else None
    return ZmqBus(high_water_mark=settings.bus.high_water_mark, linger_s=settings.bus.linger_s, keys=keys)


def _servers(settings: Settings, calls_routers: bool) -> dict[str, str]:
    """Public keys by address: the index's, and those of the routers."""
    directory, gateway = settings.bus.curve_dir, settings.gateway
    known = {settings.index.address: peer_key(directory, "index")}
    if calls_routers:
        addresses = gateway.routers or [settings.router.address]
        for address, name in zip(addresses, gateway.router_keys or ["router"] * len(addresses), strict=True):
            known[address] = peer_key(directory, name)
            if gateway.router_keys and not known[address]:
                raise ConfigError(f"no {name}.key in {directory}", field="gateway.router_keys")
    return {address: key for address, key in known.items() if key}
