"""One key that sends fifty times its share, beside four that do not: the gateway's own limits, the router's
own turns and the engines' own scheduler, in virtual time on the profile of a GPU.

Each of the four has one request at a time; a share is as much as one of them has.
"""

from __future__ import annotations

import asyncio
import random
import statistics
from dataclasses import dataclass, field
from functools import partial

from microserve.gateway.keys.key import ANONYMOUS, ApiKey
from microserve.gateway.keys.quota import Quotas
from microserve.gateway.keys.usage import Counts, UsageBook
from microserve.protocol.errors import CapacityError
from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.protocol.settings.settings import RouterSettings, Settings
from microserve.services.simulation.gateway import Answer
from microserve.services.simulation.journal import Journal
from microserve.services.simulation.load.engine import Hardware, ProfiledMesh
from microserve.services.simulation.load.timing import profile_of
from microserve.services.simulation.loop import VirtualLoop
from microserve.services.simulation.mesh import Shape, until

PROMPT, OUTPUT = 512, 64
PAUSE_S = 0.1
FLOOD_AT_S, END_S = 0.5, 3.0
FLOOD = ApiKey(name="flood")


@dataclass
class Clients:
    """Of all keys; what they got."""

    loop: VirtualLoop
    mesh: ProfiledMesh
    are_named: bool = True
    """Otherwise the gateway has no keys, and the router knows of no tenants."""
    rng: random.Random = field(default_factory=lambda: random.Random(1))
    answers: list[Answer] = field(default_factory=list)
    num_refused: int = 0

    def __post_init__(self) -> None:
        self.quotas = Quotas(UsageBook(), clock=lambda: self.loop.now, wall_clock=lambda: self.loop.now)

    async def run(self, key: ApiKey, pause_s: float, begin_s: float, end_s: float) -> None:
        """One client: a request after the other; one that is refused is sent again at once."""
        await asyncio.sleep(begin_s - self.loop.now + self.rng.random() * PAUSE_S)
        while self.loop.now < end_s:
            try:
                visit = self.quotas.enter(key)
                self.quotas.reserve(visit, 1, PROMPT + OUTPUT)
            except CapacityError:
                self.num_refused += 1
                await asyncio.sleep(0.02)
                continue
            answer = self.send(key)
            while not answer.outcome:
                await asyncio.sleep(0.002)
            assert answer.is_complete, answer.detail
            self.quotas.settle(visit, Counts(1, 0, PROMPT, 0, OUTPUT))
            await asyncio.sleep(self.rng.expovariate(1 / pause_s) if pause_s else 0.0)

    def send(self, key: ApiKey) -> Answer:
        params = SamplingParams(max_tokens=OUTPUT, temperature=0.0, ignore_eos=True)
        prompt = [self.rng.randrange(10_000) for _ in range(PROMPT)]
        answer = Answer(f"{key.name}-{len(self.answers)}", prompt, params, self.loop.now)
        answer.tenant = key.name if self.are_named else ANONYMOUS.name
        self.answers.append(answer)
        self.mesh.seats["gateway-0"].service.submit(answer, self.mesh.address("router-0"), ttl_s=600.0)
        return answer

    def ttfts_s(self, begin_s: float) -> list[float]:
        """Of the other keys' requests since then, in order of length."""
        others = [each for each in self.answers if not each.request_id.startswith(FLOOD.name)]
        late = [each for each in others if each.submitted_at > begin_s]
        return sorted(each.first_token_at - each.submitted_at for each in late)

    @property
    def num_floods(self) -> int:
        return sum(each.request_id.startswith(FLOOD.name) for each in self.answers)


@dataclass(frozen=True)
class Outcome:
    p50_s: float
    mean_s: float
    p90_s: float
    num_floods: int
    num_refused: int


def serve(num_floods: int, flood: ApiKey = FLOOD, *, are_named: bool = True) -> Outcome:
    """Four keys with a client each, and so many clients of the flood."""
    loop, product = VirtualLoop(), Settings()
    journal = Journal(loop, keep=False)
    hardware = Hardware(profile_of("h200-8b"), 1, product.engine.max_num_batched_tokens)
    shape = Shape(
        num_blocks=4096,
        block_size=16,
        max_num_seqs=product.engine.max_num_seqs,
        max_num_batched_tokens=product.engine.max_num_batched_tokens,
        max_waiting=product.engine.max_waiting,
        max_model_len=4096,
        lease_s=product.kvcache.lease_s,
        max_skew_s=0.0,
    )
    mesh = ProfiledMesh(loop, 1, shape, journal, hardware, RouterSettings(default_strategy="data_parallel"))
    clients = Clients(loop, mesh, are_named)
    began_s = 0.0

    def is_together() -> bool:
        router, gateway = mesh.seats["router-0"].service, mesh.seats["gateway-0"].service
        if router is None or gateway is None or not gateway.num_usable:
            return False
        return len(router.registry.usable()) == len(mesh.engines)

    async def main() -> None:
        nonlocal began_s
        mesh.start_all()
        await until(is_together, 10.0, 0.05)
        began_s = loop.now
        run = partial(clients.run, end_s=began_s + END_S)
        others = [run(ApiKey(name=f"key-{n}"), PAUSE_S, began_s) for n in range(4)]
        floods = [run(flood, 0.0, began_s + FLOOD_AT_S) for _ in range(num_floods)]
        async with asyncio.TaskGroup() as tasks:
            for client in [*others, *floods]:
                tasks.create_task(client)
        mesh.close()

    journal.open()
    try:
        loop.run(main())
    finally:
        journal.close()
    assert not loop.failures and not journal.defects
    ttfts = clients.ttfts_s(began_s + FLOOD_AT_S)
    assert len(ttfts) >= 10
    return Outcome(
        statistics.median(ttfts),
        statistics.fmean(ttfts),
        ttfts[int(0.9 * len(ttfts))],
        clients.num_floods,
        clients.num_refused,
    )


def test_a_key_at_fifty_times_its_share_costs_the_others_nothing() -> None:
    alone = serve(0)
    streams = serve(50, ApiKey(name=FLOOD.name, concurrent_streams=1))
    rate = serve(50, ApiKey(name=FLOOD.name, requests_per_minute=20))
    print(f"alone {alone}\nstreams limited {streams}\nrate limited {rate}")
    for flooded in (streams, rate):
        assert flooded.num_refused > 500
        assert flooded.p50_s <= 1.2 * alone.p50_s
        assert flooded.mean_s <= 1.2 * alone.mean_s


def test_a_flood_without_limits_waits_behind_the_others() -> None:
    """It uses what they leave, but for the headroom; without turns they would wait for all that it sends."""
    alone, fair, unfair = serve(0), serve(50), serve(50, are_named=False)
    print(f"alone {alone}\nfair {fair}\nunfair {unfair}")
    assert fair.p50_s <= 1.4 * alone.p50_s
    assert fair.p90_s <= 2.0 * alone.p90_s
    assert fair.mean_s - alone.mean_s < 0.5 * (unfair.mean_s - alone.mean_s)
    assert fair.num_floods > 0.6 * unfair.num_floods, "what nobody else needs is used"
