"""The bus of a process, as its settings say: sockets, keys, and whose key is expected at which address.

Owns the one way from settings to a bus, for services and commands alike. Knows addresses, and of who asks
only its role: services may share one file of settings, and a directory of keys holds no more than its owner's
peers, or one such directory for each role.
"""

from __future__ import annotations

from pathlib import Path

from microserve.protocol.bus.curve import CurveKeys, keys_of_role, peer_key
from microserve.protocol.bus.sockets import GIVE_UP_S
from microserve.protocol.bus.transport import ZmqBus
from microserve.protocol.errors import ConfigError
from microserve.protocol.security.rights import Role
from microserve.protocol.settings.settings import Settings


def open_bus(settings: Settings, role: str) -> ZmqBus:
    """Make it in the running loop, and close it. ``role``: the service's name, or ``operator`` for commands.

    Raises :class:`ConfigError` for keys of no use."""
    keys = load_keys(settings, role)
    return ZmqBus(
        high_water_mark=settings.bus.high_water_mark,
        linger_s=settings.bus.linger_s,
        # Not before a peer is lost for its silence: who is to be patient keeps his connections.
        give_up_s=max(GIVE_UP_S, settings.bus.heartbeat_interval_s * settings.bus.liveness),
        keys=keys,
        insecure=settings.bus.insecure,
    )


def load_keys(settings: Settings, role: str) -> CurveKeys | None:
    """None without a directory of keys. Raises :class:`ConfigError`."""
    if not settings.bus.curve_dir:
        return None
    directory = keys_of_role(settings.bus.curve_dir, role)
    return CurveKeys.load(directory, _servers(settings, directory, calls_routers=role == Role.GATEWAY))


def require_keys(settings: Settings) -> None:
    """For a service: without keys every user of the machine could run code in it. Raises
    :class:`ConfigError`."""
    if not (settings.bus.curve_dir or settings.bus.insecure):
        raise ConfigError(
            "bus.curve_dir is not set: make keys by 'microserve keys --mesh DIR' and set it to DIR for every "
            "service; or say bus.insecure = true, and everybody who reaches this service may read prompts "
            "and run code",
            field="bus.curve_dir",
        )


def _servers(settings: Settings, directory: Path, *, calls_routers: bool) -> dict[str, str]:
    """Public keys by address: the index's, and those of the routers."""
    gateway = settings.gateway
    known = {settings.index.address: peer_key(directory, "index")}
    if calls_routers:
        addresses = gateway.routers or [settings.router.address]
        for address, name in zip(addresses, gateway.router_keys or ["router"] * len(addresses), strict=True):
            known[address] = peer_key(directory, name)
            if gateway.router_keys and not known[address]:
                raise ConfigError(f"no {name}.key in {directory}", field="gateway.router_keys")
    return {address: key for address, key in known.items() if key}
