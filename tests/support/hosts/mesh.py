"""A mesh whose services stand on hosts: index, routers and gateway on the front, engines on the others.

Keys are made and handed out as docs/operations.md says: on the front, for each role, and a host of engines
gets the engines' directory alone. Who asks the mesh stands on the front (:meth:`HostMesh.bus`).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import shutil
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from microserve.protocol.bus.curve import CurveKeys, peer_key
from microserve.protocol.bus.transport import Bus, ZmqBus
from tests.support.bus.gateway_peer import BusClient
from tests.support.engine.engine_client import EngineClient
from tests.support.hosts.world import World
from tests.support.process.nursery import Process
from tests.support.process.processes import MeshProcesses

MICROSERVE = [sys.executable, "-P", "-m", "microserve.services"]
FRONT_PORT = 7100
"""And those behind it; nobody else has any on hosts of our own."""


@dataclass
class HostMesh(MeshProcesses):
    """As any other mesh, but for addresses, keys and places."""

    world: World = field(kw_only=True)
    places: dict[str, str] = field(default_factory=dict)
    """Hosts of services that stand elsewhere, by their names."""
    make_port: Callable[[], int] = field(default_factory=lambda: itertools.count(FRONT_PORT).__next__)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.keys = self.world.front.directory / "keys"
        if not self.keys.exists():
            self.world.front.inside.do(*MICROSERVE, "keys", "--mesh", str(self.keys))
            for host in list(self.world.hosts)[1:]:
                for role in {"engine", *(name.partition("-")[0] for name in self._others_on(host))}:
                    shutil.copytree(self.keys / role, self.world[host].directory / "keys" / role)

    @property
    def engine_hosts(self) -> list[str]:
        return [name for name in self.world.hosts if name.startswith("e")]

    def _others_on(self, host: str) -> list[str]:
        return [name for name, place in self.places.items() if place == host]

    def place_of(self, name: str) -> str:
        """The host on which a service stands."""
        if name in self.places:
            return self.places[name]
        kind, _, number = name.partition("-")
        hosts = self.engine_hosts
        return hosts[int(number) % len(hosts)] if kind == "engine" else self.world.front.name

    def host_of(self, name: str) -> str:
        return self.world[self.place_of(name)].address

    def own_settings_of(self, name: str) -> list[str]:
        host = self.world[self.place_of(name)]
        own = [f"bus.curve_dir={host.directory / 'keys'}"]
        if name.startswith("engine"):
            sockets = ("address", "events_address", "replay_address")
            own += [f"engine.{each}=tcp://{host.address}:0" for each in sockets]
            own += ['kvcache.doors=["tcp"]', f"kvcache.door_address=tcp://{host.address}:0"]
        if name.startswith("gateway"):
            own += [f"gateway.host={host.address}", "gateway.allow_no_keys=true"]
        return own + super().own_settings_of(name)

    def spawn(self, name: str, arguments: list[str], log: Path) -> Process:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with log.open("w") as sink:
            return self.world[self.place_of(name)].inside.start(
                [*MICROSERVE, *arguments], sink=sink, environment=environment
            )

    # --- who asks it, from the front -----------------------------------------------------------------

    @contextlib.contextmanager
    def bus(self, role: str = "gateway") -> Iterator[ZmqBus]:
        """Within a running loop: a bus that stands on the front, with the keys of ``role``."""
        own = self.keys / role
        servers = _OrAnEngines(peer_key(self.keys / "engine", "service"))
        servers |= dict.fromkeys(self.router_addresses.values(), peer_key(self.keys / "router", "service"))
        servers[self.index_address] = peer_key(self.keys / "index", "service")
        with self.world.front.inside.joined():
            bus = ZmqBus(linger_s=0.1, keys=CurveKeys.load(own, servers))
            try:
                yield bus
            finally:
                bus.close()

    @contextlib.asynccontextmanager
    async def client(self) -> AsyncIterator[BusClient]:
        """A gateway's connection to the router, which knows all engines."""
        with self.bus() as bus:
            async with BusClient(bus, self.router_address) as client:
                await client.wait_engines(self.num_engines)
                yield client

    async def wait_until_whole(self, *names: str, timeout_s: float = 60.0) -> None:
        """Until these engines (all that run, if none is named) hold nothing and have every block back."""
        running = [name for name, each in self.services.items() if each.process.poll() is None]
        engines = names or [name for name in running if name.startswith("engine")]
        with self.bus("router") as bus:
            for name in engines:
                left = await _held(bus, self.services[name].address, timeout_s)
                assert not left, f"{name} still has {left}"


class _OrAnEngines(dict[str, str]):
    """Keys by address; whoever is at another one is an engine: it may come back with any port."""

    def __init__(self, engine_key: str) -> None:
        super().__init__()
        self._engine_key = engine_key

    def __missing__(self, address: str) -> str:
        return self._engine_key

    def get(self, address: str, default: str = "") -> str:  # type: ignore[override]
        return self[address]


async def _held(bus: Bus, address: str, timeout_s: float) -> str:
    """What an engine still holds after a time; empty: nothing, sooner or later."""
    left = "no answer"
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s), EngineClient(bus, address) as engine:
            assert engine.info is not None
            while left:
                load = (await engine.stats()).load
                held = {
                    "running": load.num_running,
                    "waiting": load.num_waiting,
                    "grants": load.num_grants,
                    "quarantined": load.quarantined_blocks,
                    "blocks not free": engine.info.num_blocks - load.free_blocks,
                }
                left = ", ".join(f"{count} {what}" for what, count in held.items() if count)
                if left:
                    await asyncio.sleep(0.05)
    return left
