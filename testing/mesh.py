"""A mesh in memory for an author's test: engines with labels, caches, loads and faults, and requests to it.

Owns what a test may do to it. Time is virtual: a second of it takes as long as what happens in it, and the
same test gives the same run. Engines compute hashes in the place of a model, so that each answer proves that
the right KV was read; a layer of a step takes 4 ms and 0.2 ms for each token, and there are two.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import msgspec

from microserve.protocol.errors import ConfigError
from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.protocol.messages.strategy.control import Scalar
from microserve.protocol.settings.settings import Settings
from microserve.services.router.authoring import Chunks, Mesh, Request, strategy
from microserve.services.router.authoring.definition import Strategy, load_file
from microserve.services.router.service import Router
from microserve.services.router.strategies import BUILT_IN
from microserve.services.simulation.engine.engine import VOCAB_SIZE
from microserve.services.simulation.engine.hash_runner import expected_tokens
from microserve.services.simulation.gateway import Answer as SimulatedAnswer
from microserve.services.simulation.journal import Journal
from microserve.services.simulation.loop import Process, VirtualLoop
from microserve.services.simulation.mesh import Seat, Shape, SimulatedMesh, until
from microserve.services.simulation.network import Weather
from microserve.testing.answer import Answer, answer_of

BLOCK_SIZE = 16
MAX_MODEL_LEN = 16_384
LOOK_S = 0.005
JOIN_S = 10.0
TOLD_S = 0.6
"""Heartbeats and cache events have come to every router by then."""

T = TypeVar("T")


@dataclass(frozen=True)
class Engine:
    """One engine of a mesh in memory."""

    id: str
    labels: Sequence[str] = ()
    """Empty: it serves every label."""
    slowness: float = 1.0
    """A step takes so many times as long as on the others."""
    cluster: str = ""


@strategy
async def on_engine(mesh: Mesh, request: Request) -> Chunks:
    """Where the test says; for what it fills caches and queues with."""
    wanted = request.attributes["engine"]
    [engine] = [each for each in mesh.engines() if each.id == wanted]
    yield engine.start_generate(request)


class _NamedMesh(SimulatedMesh):
    """Engines have the ids of the test, and strategies the parameters of the test alone."""

    engine_ids: Sequence[str] = ()
    parameters: Mapping[str, Mapping[str, Scalar]] = {}

    def settings(self, name: str) -> Settings:
        settings = super().settings(name)
        engine, router = settings.engine, settings.router
        if name in self.engines:
            engine = msgspec.structs.replace(engine, id=self.engine_ids[self.engines.index(name)])
        own = {name: dict(values) for name, values in self.parameters.items()}
        router = msgspec.structs.replace(router, strategies=own)
        return msgspec.structs.replace(settings, engine=engine, router=router)

    def _ended(self, seat: Seat, process: Process) -> None:
        """It stays away until the test starts it."""
        if seat.process is process:
            self.kill(seat.name)


class MeshInMemory:
    """A context manager; :meth:`run` what asks it. One at a time in a process."""

    def __init__(
        self,
        strategy: Strategy | str | Path,
        *engines: Engine,
        parameters: Mapping[str, Scalar] | None = None,
        num_routers: int = 1,
        num_blocks: int = 4096,
    ) -> None:
        """``strategy``: a file or folder, the name of a shipped one, or what ``@strategy`` made; of a file
        with several the one with the file's name. Without ``engines`` there is one, ``e0``. ``num_blocks``:
        KV blocks of 16 tokens on each engine. Raises :class:`ConfigError` for a file that holds no strategy,
        and for two engines of one id.
        """
        self.strategy = _strategy(strategy).bind(parameters or {})
        is_shipped = any(each.function is self.strategy.function for each in BUILT_IN)
        if not is_shipped and any(each.name == self.strategy.name for each in BUILT_IN):
            self.strategy = replace(
                self.strategy, name=f"own_{self.strategy.name}"
            )  # a router has each name once
        chosen = engines or (Engine("e0"),)
        if len({engine.id for engine in chosen}) < len(chosen):
            raise ConfigError(f"two engines of one name: {', '.join(engine.id for engine in chosen)}")
        self._seats = {engine.id: f"engine-{number}" for number, engine in enumerate(chosen)}
        self._loop = VirtualLoop()
        self._journal = Journal(self._loop, keep=False)
        shape = Shape(
            num_engines=len(chosen),
            num_routers=num_routers,
            num_blocks=num_blocks,
            block_size=BLOCK_SIZE,
            max_num_batched_tokens=512,
            max_model_len=MAX_MODEL_LEN,
            labels=tuple(tuple(engine.labels) for engine in chosen),
            clusters=tuple(engine.cluster for engine in chosen),
            strategies=(on_engine,) if is_shipped else (on_engine, self.strategy),
            max_skew_s=0.0,
        )
        self._mesh = _NamedMesh(self._loop, 1, shape, self._journal)
        self._mesh.engine_ids = [*self._seats]
        self._mesh.parameters = {self.strategy.name: parameters or {}} if is_shipped else {}
        self._slowness = {engine.id: engine.slowness for engine in chosen}
        self._rng = random.Random("prompts of a test")
        self._num_asked = 0
        self._taken: dict[str, list[int]] = {}
        self._beside: list[asyncio.Future[Answer]] = []

    def __enter__(self) -> Self:
        self._journal.open()
        try:
            self._loop.run(self._begin())
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.run(self._end())
        self._journal.close()

    async def _begin(self) -> None:
        self._mesh.start_all()
        await self.joined()
        for engine_id, slowness in self._slowness.items():
            self.slow(engine_id, slowness)

    async def _end(self) -> None:
        self._mesh.close()

    def run(self, story: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the mesh's time; what it raises comes out."""
        return self._loop.run(story)

    # --- requests ----------------------------------------------------------------------------------

    async def ask(
        self,
        *,
        prompt_tokens: int = 100,
        prompt: Sequence[int] | None = None,
        max_tokens: int = 4,
        attributes: Mapping[str, str] | None = None,
        tenant: str = "",
        priority: int = 0,
        temperature: float = 0.0,
        seed: int = 0,
        router: int = 0,
        strategy: str | None = None,
        leave_after_s: float | None = None,
        timeout_s: float = 30.0,
    ) -> Answer:
        """Ask, and wait for the end. ``prompt_tokens``: of a new prompt that shares no prefix with others;
        ``prompt``: this one. ``attributes``: as the gateway would tell them. ``router``: which of them.
        ``strategy``: by another one that routers know. ``leave_after_s``: the client does not wait longer.

        An error of the mesh is an answer too (``reason``). Raises ``AssertionError`` for wrong tokens: they
        are the same however a request is served.
        """
        tokens = list(prompt) if prompt is not None else self.prompt(prompt_tokens)
        params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed, ignore_eos=True)
        answer = SimulatedAnswer(f"ask-{self._num_asked}", tokens, params, self._loop.now)
        self._num_asked += 1
        answer.strategy = strategy or self.strategy.name
        answer.attributes, answer.tenant, answer.priority = dict(attributes or {}), tenant, priority
        gateway = self._mesh.seats["gateway-0"].service
        gateway.submit(answer, self._mesh.address(f"router-{router}"), ttl_s=timeout_s)
        if leave_after_s is not None:
            self._loop.at(self._loop.now + leave_after_s, gateway.cancel, answer)
        await until(lambda: bool(answer.outcome), 2 * timeout_s, LOOK_S)
        expected = expected_tokens(tokens, params, vocab_size=VOCAB_SIZE, block_size=BLOCK_SIZE)
        assert answer.token_ids == expected[: len(answer.token_ids)], f"wrong tokens: {answer}"
        found, _ = self._router(router).serving.explain(answer.request_id)
        return answer_of(answer, found[0] if found else None)

    def prompt(self, num_tokens: int) -> list[int]:
        """A new one; to ask for a prefix of it, or with more behind it."""
        return [self._rng.randrange(VOCAB_SIZE) for _ in range(num_tokens)]

    # --- what engines are like ---------------------------------------------------------------------

    async def warm(self, engine_id: str, prompt: Sequence[int]) -> None:
        """Let the engine have the prompt in its prefix cache, and the routers know it."""
        where = {"engine": engine_id}
        answer = await self.ask(prompt=prompt, max_tokens=1, attributes=where, strategy="on_engine")
        assert answer.is_good, answer.detail
        await asyncio.sleep(TOLD_S)

    async def occupy(
        self, engine_id: str, num_requests: int = 1, *, prompt_tokens: int = 100, max_tokens: int = 1000
    ) -> None:
        """Let so many requests run on the engine, and the routers hear of it. They go on beside the test."""
        for _ in range(num_requests):
            asking = self.ask(
                prompt_tokens=prompt_tokens,
                max_tokens=max_tokens,
                attributes={"engine": engine_id},
                strategy="on_engine",
                timeout_s=3600.0,
            )
            self._beside.append(asyncio.ensure_future(asking))
        await asyncio.sleep(TOLD_S)

    def slow(self, engine_id: str, times: float) -> None:
        """From now on its steps take so many times as long; 1: as at first."""
        pacer = self._mesh.seats[self._seats[engine_id]].service.pacer
        pacer.slowness = times
        pacer.hurry()

    def fill(self, engine_id: str) -> None:
        """Take all blocks of its KV cache: there is no room for anybody until :meth:`empty`."""
        pool = self._mesh.seats[self._seats[engine_id]].service.core.memory.pool
        self._taken.setdefault(engine_id, []).extend(pool.allocate(pool.num_free))

    def empty(self, engine_id: str) -> None:
        """Give back what :meth:`fill` has taken."""
        pool = self._mesh.seats[self._seats[engine_id]].service.core.memory.pool
        pool.free(self._taken.pop(engine_id))

    def kill(self, engine_id: str) -> None:
        """As SIGKILL; the routers miss it after a while."""
        self._taken.pop(engine_id, None)
        self._mesh.kill(self._seats[engine_id])

    def start(self, engine_id: str) -> None:
        """A new life of an engine that was killed, with an empty cache."""
        self._mesh.start(self._seats[engine_id])

    def drain(self, engine_id: str) -> None:
        """As ``microserve drain``: it takes nothing new, what runs there moves, and it leaves."""
        self._mesh.terminate(self._seats[engine_id])

    def late(self, share: float, max_s: float = 0.2) -> None:
        """From now on this share of all messages comes up to so much later; 0: none."""
        self._mesh.network.weather = Weather(delay=share, max_delay_s=max_s)

    # --- what there is to know ---------------------------------------------------------------------

    @property
    def now(self) -> float:
        """Virtual seconds; ``await asyncio.sleep(...)`` lets them pass."""
        return self._loop.now

    @property
    def mistakes(self) -> list[str]:
        """What the strategy has done wrong so far, with its lines. Requests were served all the same."""
        told = [f"{place}: {text}" if place else text for text, place in self._journal.mistakes]
        return told + self._loop.failures

    def state(self, router: int = 0) -> dict[str, Any]:
        """The strategy's ``mesh.state`` in that router."""
        return self._router(router).serving.plans.use(self._router(router).strategies.get(self.strategy.name))

    async def joined(self) -> None:
        """Wait until every router has every engine, as after :meth:`start`. Raises ``AssertionError`` when
        they do not come together."""
        await until(self._is_together, JOIN_S, LOOK_S)
        assert self._is_together(), self._loop.failures or "the mesh does not come together"

    def _router(self, number: int) -> Router:
        router: Router = self._mesh.seats[f"router-{number}"].service
        return router

    def _is_together(self) -> bool:
        routers = [self._mesh.seats[name].service for name in self._mesh.routers]
        gateway = self._mesh.seats["gateway-0"].service
        if gateway is None or gateway.num_usable < len(routers) or None in routers:
            return False
        return all(len(router.registry.usable()) == len(self._seats) for router in routers)


def _strategy(given: Strategy | str | Path) -> Strategy:
    if isinstance(given, Strategy):
        return given
    for each in BUILT_IN:
        if each.name == given:
            return each
    found = load_file(str(given))
    return next((each for each in found if each.name == Path(given).stem), found[0])
