"""A small mesh that a strategy is tried in, and the requests that come to it.

Owns what a request of a trial looks like: prompts as the campaign draws them or long ones, who asks, which of
two routers it comes to, and whether its client leaves. Judges nothing.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from microserve.protocol.errors import InternalError
from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.protocol.messages.strategy.control import PUBLISH, Change, Changed, Scalar
from microserve.services.index.service import IndexService
from microserve.services.router.oversight.overseer import Overseer
from microserve.services.router.service import Router
from microserve.services.simulation.engine.engine import VOCAB_SIZE
from microserve.services.simulation.faults.scenario import draw
from microserve.services.simulation.gateway import Answer
from microserve.services.simulation.journal import Journal
from microserve.services.simulation.loop import VirtualLoop
from microserve.services.simulation.mesh import INDEX, Shape, SimulatedMesh, until

MAX_ENGINES = 8
"""A larger mesh is tried with so many."""
GAP_S = 0.15
"""Between two requests: the later ones meet the earlier ones."""
TTL_S = 20.0
LOOK_S = 0.05
JOIN_S = 10.0
LEAVES_AFTER_S = 0.06
ATTRIBUTE = re.compile(
    r"""["'](user|prompt_cache_key|safety_identifier|service_tier|metadata(?:\.[\w.-]+)?|header\.[\w-]+)["']"""
)
"""A name of an attribute, as a source writes it."""

Labels = Sequence[Sequence[str]]
"""Of each engine."""


@dataclass
class TrialWorld:
    """Make it inside a running loop, ``begin``, let requests come, ``close``."""

    mesh: SimulatedMesh
    strategy: str
    attributes: Sequence[str] = ()
    """Names that some requests have and others have not."""
    answers: list[Answer] = field(default_factory=list)
    rng: random.Random = field(default_factory=lambda: random.Random("trial"))

    async def begin(self) -> None:
        self.mesh.start_all()
        await until(self.is_together, JOIN_S, LOOK_S)

    def is_together(self) -> bool:
        """Every router has all engines, and the gateway has every router."""
        routers, gateway = self.routers(), self.mesh.seats["gateway-0"].service
        if gateway is None or gateway.num_usable < len(routers):
            return False
        return all(len(router.registry.usable()) == len(self.mesh.engines) for router in routers)

    def routers(self) -> list[Router]:
        return [each for each in self.mesh.living(self.mesh.routers) if each is not None]

    async def publish(self, source: str, parameters: Mapping[str, Scalar]) -> list[str]:
        """As an operator does; why routers do not run it, if they do not."""
        index: IndexService = self.mesh.seats[INDEX].service
        change = Change(1, "dry run", PUBLISH, self.strategy, source, dict(parameters))
        reply = index.control.answer(change, "")
        if not isinstance(reply, Changed):
            raise InternalError(f"the index answered {reply}")
        routers = self.routers()
        await until(lambda: all(each.control.version >= reply.version for each in routers), JOIN_S, LOOK_S)
        return [fault.reason for router in routers for fault in router.control.faults]

    async def come(self, count: int, *, leaving: bool = False) -> None:
        """So many requests, one after the other; ``leaving``: some of their clients do not wait."""
        for _ in range(count):
            template = draw(len(self.answers)).arrivals[0]
            answer = self.submit(template.prompt, template.params)
            if leaving and len(self.answers) % 4 == 0:
                gateway = self.mesh.seats["gateway-0"].service
                self.mesh.loop.at(self.mesh.loop.now + LEAVES_AFTER_S, gateway.cancel, answer)
            await asyncio.sleep(GAP_S)

    def submit_long(self, num_tokens: int) -> None:
        prompt = [self.rng.randrange(VOCAB_SIZE) for _ in range(num_tokens)]
        self.submit(prompt, SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True))

    def submit(self, prompt: Sequence[int], params: SamplingParams) -> Answer:
        number = len(self.answers)
        answer = Answer(f"dry-{number}", list(prompt), params, self.mesh.loop.now)
        answer.strategy, answer.priority = self.strategy, number % 3
        answer.tenant = f"tenant-{number % 4}" if number % 4 else ""
        if number % 2:
            answer.attributes = {name: f"{name}-{number % 5}" for name in ("user", *self.attributes)}
        self.answers.append(answer)
        routers = self.mesh.routers
        address = self.mesh.address(routers[number % len(routers)])
        self.mesh.seats["gateway-0"].service.submit(answer, address, ttl_s=TTL_S)
        return answer

    async def wait(self, patience_s: float) -> None:
        """Until all have ended, or so long."""
        await until(lambda: all(answer.outcome for answer in self.answers), patience_s, LOOK_S)

    def call_soon(self, delay_s: float, call: Callable[[], object]) -> None:
        """By the clock of the world."""
        self.mesh.loop.at(self.mesh.loop.now + delay_s, call)


def make_world(
    loop: VirtualLoop,
    journal: Journal,
    strategy: str,
    labels: Labels,
    attributes: Sequence[str],
    overseer: Overseer | None,
    *,
    num_routers: int,
) -> TrialWorld:
    labels = labels[:MAX_ENGINES] or [[]]
    shape = Shape(
        num_engines=len(labels),
        num_routers=num_routers,
        num_blocks=6144,
        max_num_batched_tokens=256,
        max_model_len=9000,
        labels=tuple(tuple(each) for each in labels),
        max_skew_s=0.0,
    )
    return TrialWorld(SimulatedMesh(loop, 1, shape, journal, overseer), strategy, attributes)


def attributes_in(sources: Mapping[str, str]) -> list[str]:
    """Those that a source names."""
    return sorted({name for text in sources.values() for name in ATTRIBUTE.findall(text)})
