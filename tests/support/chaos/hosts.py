"""The mesh that chaos is done to, on hosts (tests/support/hosts): each engine has its own, which may be
unplugged, deaf, mute, or without power."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from microserve.protocol.bus.transport import Bus
from microserve.protocol.settings.settings import BusSettings
from tests.support.chaos.mesh import ChaosMesh, chaos_settings
from tests.support.hosts.mesh import HostMesh
from tests.support.hosts.world import World

HOSTS = ("front", "e0", "e1", "e2")
DOOR_SILENCE_S = 3


@dataclass
class HostChaosMesh(HostMesh, ChaosMesh):
    @contextlib.contextmanager
    def buses(self) -> Iterator[tuple[Bus, Bus]]:
        with self.bus("gateway") as asks_routers, self.bus("router") as asks_engines:
            yield asks_routers, asks_engines

    def harm(self, kind: str, name: str) -> None:
        host, front = self.place_of(name), self.world.front.name
        match kind:
            case "unplug":
                self.world.cut(host)
            case "deafen":
                for other in self.world.hosts:
                    if other != host:
                        self.world.lose(other, host)
            case "mute":
                self.world.lose(host, front)
            case "vanish":
                self.world.vanish(host)

    def heal(self, name: str) -> None:
        self.world.heal(self.place_of(name))

    async def restart(self, name: str) -> None:
        host = self.place_of(name)
        if self.world[host].inside.has_ended:
            self.world.come_back(host)
        await super().restart(name)


def host_chaos_mesh(model: Path, directory: Path, bus: BusSettings, world: World) -> HostChaosMesh:
    return HostChaosMesh(
        model,
        directory,
        num_engines=3,
        num_routers=2,
        gateway=True,
        settings=[*chaos_settings(bus), f"kvcache.door_silence_s={DOOR_SILENCE_S}"],
        world=world,
    )
