"""A real router between scripted engines, a scripted index and a gateway of the test, over real sockets."""

from __future__ import annotations

import asyncio
import functools
import gc
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any, ParamSpec

from microserve.protocol.bus import codec
from microserve.protocol.bus.transport import Bus, ZmqBus
from microserve.protocol.messages import index as membership
from microserve.protocol.messages.check import Suspect
from microserve.protocol.messages.engine import EngineInfo, EngineLoad
from microserve.protocol.messages.strategy import decisions
from microserve.protocol.messages.strategy.control import ControlState, VersionFault
from microserve.protocol.process.lifecycle import Lifecycle
from microserve.protocol.settings.settings import BusSettings, IndexSettings, RouterSettings, Settings
from microserve.services.router.authoring.action.generating import Chunks
from microserve.services.router.authoring.definition import Strategy
from microserve.services.router.authoring.mesh import Mesh
from microserve.services.router.oversight.overseer import Overseer
from microserve.services.router.request.request import Request
from microserve.services.router.service import Router
from tests.support.bus.gateway_peer import Answer, GatewayPeer
from tests.support.router.fabric import Fabric
from tests.support.router.scripted_engine import ANY, ScriptedEngine, output_token

INTERVAL_S = 0.05
LIVENESS = 60
"""Generous: on a busy machine the threads of ZeroMQ may be late. Tests of silence choose their own."""


P = ParamSpec("P")


def in_loop(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Run an async test in a loop of its own; whatever reaches the loop's exception handler fails it."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        complaints: list[dict[str, Any]] = []

        async def main() -> None:
            asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
            await test(*args, **kwargs)
            gc.collect(1)

        asyncio.run(main())
        assert not complaints

    return run


async def eventually(condition: Callable[[], object], what: str = "", timeout_s: float = 30.0) -> None:
    """Wait until a condition holds; fails with ``what`` after ``timeout_s``."""
    try:
        async with asyncio.timeout(timeout_s):
            while not condition():
                await asyncio.sleep(0.002)
    except TimeoutError:
        raise AssertionError(f"did not come true: {what or condition}") from None


class ScriptedIndex:
    """Tells watchers what the test says."""

    def __init__(self, bus: Bus, *, incarnation: int = 1, address: str = ANY) -> None:
        self.incarnation = incarnation
        self.version = 0
        self.infos: list[EngineInfo] = []
        self.suspects: list[Suspect] = []
        self.routers: list[str] = []
        self.watches = 0
        self.last_watch: membership.Watch | None = None
        self.answers: list[decisions.Answer] = []
        self._watchers: set[bytes] = set()
        self._socket = bus.server(address, self._receive)

    @property
    def address(self) -> str:
        return self._socket.address

    def set(self, infos: Iterable[EngineInfo]) -> None:
        self.infos = list(infos)
        self.version += 1
        for peer in self._watchers:
            self._answer(peer)

    def control(self, state: ControlState) -> None:
        for peer in self._watchers:
            self.send(peer, state)

    def ask(self, question: decisions.Question) -> None:
        for peer in self._watchers:
            self.send(peer, question)

    def acknowledged(self) -> tuple[int, list[VersionFault]]:
        """What the last ``Watch`` said of control."""
        assert self.last_watch is not None
        return self.last_watch.control_version, self.last_watch.faults

    def _receive(self, peer: bytes, frames: list[bytes]) -> None:
        message, _ = codec.INDEX_REQUEST.decode(frames)
        if isinstance(message, decisions.Answer):
            self.answers.append(message)
            return
        assert isinstance(message, membership.Watch)
        self.watches += 1
        self.last_watch = message
        self._watchers.add(peer)
        self._answer(peer)

    def _answer(self, peer: bytes) -> None:
        members = [membership.Member(info, EngineLoad()) for info in self.infos]
        told = membership.Members(
            self.incarnation, self.version, members, suspects=self.suspects, routers=self.routers
        )
        self.send(peer, told)

    def send(self, peer: bytes, message: membership.IndexReply) -> None:
        self._socket.send(peer, codec.INDEX_REPLY.encode(message))

    def close(self) -> None:
        self._socket.close()


class World:
    """What :func:`router_world` yields."""

    def __init__(
        self, bus: ZmqBus, settings: Settings, index: ScriptedIndex, overseer: Overseer | None = None
    ) -> None:
        self.bus = bus
        self.settings = settings
        self.index = index
        self.fabric = Fabric()
        self.engines: dict[str, ScriptedEngine] = {}
        self.router = Router(settings, bus, seed=1, overseer=overseer)
        self.lifecycle = Lifecycle()
        self.running = asyncio.create_task(self.router.run(self.lifecycle))
        self.gateway = GatewayPeer(bus, self.router.address)
        self._gateways = [self.gateway]

    def add_engine(self, engine_id: str, incarnation: int = 1, **info: Any) -> ScriptedEngine:
        """Not listed by the index before :meth:`list_engines`."""
        engine = ScriptedEngine(self.bus, self.fabric, engine_id, incarnation, interval_s=INTERVAL_S, **info)
        self.engines[engine_id] = engine
        return engine

    async def list_engines(self, *engines: ScriptedEngine) -> None:
        """Let the index list these (default: all) and wait until the router has joined them."""
        chosen = engines or tuple(self.engines.values())
        self.index.set(engine.info for engine in chosen)
        for engine in chosen:
            await eventually(
                lambda engine=engine: any(  # type: ignore[misc]
                    c.info.incarnation == engine.incarnation and c.engine_id == engine.engine_id
                    for c in self.router.registry.usable()
                ),
                f"{engine.engine_id} joined",
            )

    async def beats(self, count: int) -> None:
        """Wait until so many heartbeat intervals of the router have passed."""
        have = len(self.gateway.heartbeats)
        await eventually(lambda: len(self.gateway.heartbeats) >= have + count, "heartbeats")

    def connect_gateway(self, **fields: Any) -> GatewayPeer:
        gateway = GatewayPeer(self.bus, self.router.address, **fields)
        self._gateways.append(gateway)
        return gateway

    def calls(self) -> list[tuple[str, str]]:
        """(engine, action) of everything but aborts, by engine."""
        return [
            (engine.engine_id, type(call).__name__)
            for engine in self.engines.values()
            for call in engine.calls
            if type(call).__name__ != "Abort"
        ]

    def forget_calls(self) -> None:
        for engine in self.engines.values():
            engine.calls.clear()
            engine.with_tokens.clear()

    async def check_clean(self) -> None:
        """Nothing is live, nothing is booked, and no living engine holds anything."""
        serving_ = self.router.serving
        await eventually(lambda: len(serving_) == 0, "no live request")
        serving_.book.check_integrity()
        assert serving_.book.is_zero, "the book is zero"
        assert serving_.turnstile.is_idle, "nobody has a turn"
        for engine in self.engines.values():
            if not engine.silent:
                await eventually(engine.is_clean, f"{engine.engine_id} holds nothing: {engine.held}")
        for connection in self.router.registry.joined():
            await eventually(lambda c=connection: c.is_idle or c.is_ended, "no abort is open")  # type: ignore[misc]
            await eventually(lambda c=connection: not c.has_waiters, "nobody waits")  # type: ignore[misc]

    async def stop(self) -> None:
        self.running.cancel()
        await asyncio.wait([self.running])
        for gateway in self._gateways:
            gateway.close()
        for engine in self.engines.values():
            engine.close()
        self.index.close()
        self.bus.close()


def make_settings(index_address: str, **router: Any) -> Settings:
    bus: dict[str, Any] = {"heartbeat_interval_s": INTERVAL_S, "liveness": LIVENESS, "linger_s": 0.05}
    bus |= {key: router.pop(key) for key in ("credit", "stuck_s", "liveness") if key in router}
    chosen: dict[str, Any] = {"address": ANY, "call_timeout_s": 5.0, "index_max_mb": 1, **router}
    return Settings(
        bus=BusSettings(**bus), index=IndexSettings(address=index_address), router=RouterSettings(**chosen)
    ).check()


async def open_world(
    *engine_ids: str,
    labels: dict[str, list[str]] | None = None,
    overseer: Overseer | None = None,
    **router: Any,
) -> World:
    """A world with these engines joined; ``router`` overrides settings of ``router`` and some of ``bus``."""
    bus = ZmqBus(linger_s=0.05)
    index = ScriptedIndex(bus)
    world = World(bus, make_settings(index.address, **router), index, overseer)
    for engine_id in engine_ids:
        world.add_engine(engine_id, labels=(labels or {}).get(engine_id, []))
    if engine_ids:
        await world.list_engines()
    await eventually(lambda: world.gateway.welcomes, "welcome")
    return world


@asynccontextmanager
async def router_world(*engine_ids: str, check: bool = True, **fields: Any) -> AsyncIterator[World]:
    """As :func:`open_world`; at the end everything must be clean."""
    world = await open_world(*engine_ids, **fields)
    try:
        yield world
        if check:
            await world.check_clean()
    finally:
        await world.stop()
    if not world.running.cancelled():
        error = world.running.exception()
        if error is not None:
            raise error


async def serve_with(
    world: World,
    body: Callable[[Mesh, Request], Chunks],
    prompt: Sequence[int],
    **fields: Any,
) -> Answer:
    """Serve a prompt by a strategy of the test's own."""
    name = start_with(world, body)
    return await world.gateway.generate(prompt, strategy=name, **fields)


def start_with(world: World, body: Callable[[Mesh, Request], Chunks]) -> str:
    """Add a strategy of the test's own; its name."""
    name = f"test_{len(world.router.strategies.names)}"
    world.router.strategies.add(Strategy(name, body, {}, {}, ""))
    return name


def expected_output(max_tokens: int) -> list[int]:
    return [output_token(position) for position in range(max_tokens)]
