"""The bus of a process, as its settings say: sockets, keys, and whose key is expected at which address.

Owns the one way from settings to a bus, for services and commands alike; knows addresses, not who asks.
"""

from __future__ import annotations

from microserve.protocol.bus.curve import CurveKeys, peer_key
from microserve.protocol.bus.transport import ZmqBus
from microserve.protocol.errors import ConfigError
from microserve.protocol.settings import Settings


def open_bus(settings: Settings) -> ZmqBus:
    """Make it in the running loop, and close it. Raises :class:`ConfigError` for keys of no use."""
    directory = settings.bus.curve_dir
    keys = CurveKeys.load(directory, _servers(settings)) if directory else None
    return ZmqBus(high_water_mark=settings.bus.high_water_mark, linger_s=settings.bus.linger_s, keys=keys)


def _servers(settings: Settings) -> dict[str, str]:
    """Public keys by address: the index's, and those of the routers that a gateway calls."""
    directory, gateway = settings.bus.curve_dir, settings.gateway
    routers = dict.fromkeys(gateway.routers or [settings.router.address], peer_key(directory, "router"))
    if gateway.router_keys:
        for address, name in zip(routers, gateway.router_keys, strict=True):
            routers[address] = peer_key(directory, name)
            if not routers[address]:
                raise ConfigError(f"no {name}.key in {directory}", field="gateway.router_keys")
    known = {settings.index.address: peer_key(directory, "index"), **routers}
    return {address: key for address, key in known.items() if key}
