"""Two engines of one model in processes of their own, and connections to them that leave nothing behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from microserve.protocol.bus.curve import CurveKeys, keys_of_role
from microserve.protocol.bus.transport import ZmqBus
from microserve.protocol.messages.engine import EngineLoad
from microserve.protocol.messages.engine_info import EngineInfo
from tests.support.engine_conformance.engine_process import READY_S, EngineProcess, Launch
from tests.support.engine_conformance.wire_client import RefusedError, WireClient

SETTLED_S = 180.0
LEASE_S = 1.5
"""Of ``a``'s grants: what is about leases lets ``a`` receive, everything else ``b``."""


@dataclass
class Pair:
    """``a`` sends and ``b`` receives, unless a test says otherwise."""

    launch: Launch
    directory: Path
    a: EngineProcess = field(init=False)
    b: EngineProcess = field(init=False)
    free_blocks: dict[str, int] = field(default_factory=dict)
    """When it had served nobody, by engine."""

    def start(self) -> None:
        """Both, at once; returns when both serve."""
        self.a = EngineProcess.start(self.launch, "engine-a", self.directory, kvcache__lease_s=str(LEASE_S))
        self.b = EngineProcess.start(self.launch, "engine-b", self.directory)
        try:
            asyncio.run(self._await(self.a, self.b))
        except BaseException:
            self.stop()
            raise

    def start_another(self, name: str) -> EngineProcess:
        """One more; whoever asks stops it."""
        engine = EngineProcess.start(self.launch, name, self.directory)
        try:
            asyncio.run(self._await(engine))
        except BaseException:
            engine.stop()
            raise
        return engine

    async def restart(self, engine: EngineProcess) -> EngineProcess:
        """Another life of an engine that has ended, under its name."""
        assert engine.process.poll() is not None
        own = {"kvcache__lease_s": str(LEASE_S)} if engine is self.a else {}
        fresh = EngineProcess.start(self.launch, engine.name, self.directory, **own)
        if engine is self.a:
            self.a = fresh
        else:
            self.b = fresh
        await self._await(fresh)
        return fresh

    def stop(self) -> None:
        for engine in (self.a, self.b):
            engine.stop()

    @asynccontextmanager
    async def bus(self, role: str = "router") -> AsyncIterator[ZmqBus]:
        """Sockets with the keys of a role of the mesh."""
        keys = CurveKeys.load(keys_of_role(self.launch.keys, role))
        with self.launch.joined():
            bus = ZmqBus(linger_s=0.1, keys=keys)
            try:
                yield bus
            finally:
                bus.close()

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[tuple[WireClient, WireClient]]:
        """One router's connections to ``a`` and ``b``, in this order. At the end both engines hold nothing
        that they did not hold at their start."""
        async with self.bus() as bus:
            clients = [self.client(bus, engine) for engine in (self.a, self.b)]
            for client in clients:
                await client.hello()
            yield clients[0], clients[1]
            for client in clients:
                await self.settled(client)

    @staticmethod
    def client(bus: ZmqBus, engine: EngineProcess, *, router_id: str = "") -> WireClient:
        """Before its hello."""
        return WireClient(bus, engine.address, engine.server_key, router_id=router_id)

    async def settled(self, client: WireClient) -> EngineLoad:
        """Nothing runs, waits, is granted or in quarantine there, and every block is free again."""
        free = self.free_blocks[client.info.engine_id]
        return await until_load(client, lambda load: is_idle(load) and load.free_blocks == free)

    async def _await(self, *engines: EngineProcess) -> None:
        async with self.bus() as bus, asyncio.TaskGroup() as tasks:
            for engine in engines:
                tasks.create_task(self._serves(bus, engine))

    async def _serves(self, bus: ZmqBus, engine: EngineProcess) -> EngineInfo:
        """Say hello until it is welcome; one that ends is an error at once."""
        client = self.client(bus, engine)
        async with asyncio.timeout(READY_S):
            while True:
                asking = asyncio.create_task(client.hello(pings=False))
                try:
                    while not asking.done():
                        engine.require_alive()
                        await asyncio.wait([asking], timeout=0.1)
                    welcome = asking.result()
                except (TimeoutError, RefusedError):  # it is there, and starts yet
                    await asyncio.sleep(0.1)
                    continue
                finally:
                    asking.cancel()
                client.close()
                self.free_blocks[engine.name] = welcome.load.free_blocks
                return welcome.info


async def until_load(client: WireClient, is_so: Callable[[EngineLoad], bool]) -> EngineLoad:
    """Ask the engine what it does until that is so."""
    load = EngineLoad()
    try:
        async with asyncio.timeout(SETTLED_S):
            while not is_so(load := (await client.stats()).load):
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"{client.info.engine_id} stays as it is: {load}") from None
    return load


def is_idle(load: EngineLoad) -> bool:
    busy = load.num_running + load.num_waiting + load.num_grants + load.queued_prefill_tokens
    return busy == 0 and load.quarantined_blocks == 0
