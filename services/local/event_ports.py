"""Where each engine of a mesh publishes its KV events: fixed ports, for readers that are not ours.

Our own readers hear addresses from the index. Others are told them once, so they are to stay what they are:
the port of a setting is the first engine's, and each further engine's is one higher.
"""

from __future__ import annotations

from microserve.protocol.bus.address import port_of, shifted
from microserve.protocol.errors import ConfigError
from microserve.protocol.settings.settings import Settings

SETTINGS = ("events_address", "replay_address")


def check_event_ports(settings: Settings) -> None:
    """That there is a port for every engine. Raises :class:`ConfigError` naming the setting."""
    num_engines = settings.mesh.engines
    taken: dict[int, str] = {}
    for name in SETTINGS:
        address = getattr(settings.engine, name)
        first = port_of(address)
        if not first:
            continue
        for port in range(first, first + num_engines):
            if port > 65535:
                raise ConfigError(
                    f"engine.{name} {address} leaves no ports for {num_engines} engines",
                    field=f"engine.{name}",
                )
            if port in taken:
                raise ConfigError(
                    f"engine.{name} {address}: {num_engines} engines would take ports {first} to "
                    f"{first + num_engines - 1}, and engine.{taken[port]} has {port}",
                    field=f"engine.{name}",
                )
            taken[port] = name


def event_ports(settings: Settings, number: int) -> dict[str, str]:
    """Settings of the engine of that number, by their paths."""
    found = {}
    for name in SETTINGS:
        address = getattr(settings.engine, name)
        if port_of(address):
            found[f"engine.{name}"] = shifted(address, number)
    return found
