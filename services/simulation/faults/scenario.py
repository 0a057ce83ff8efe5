"""What a seed means: the size of a mesh, the requests that come, the faults that befall it.

Pure: a scenario is drawn from its seed alone and can be printed. Most are storms: each takes a few kinds of
faults and leaves the others out (swarm testing: combinations that a fixed mix never makes). Some are calm,
and some have one single failing engine: there more is promised, and checked.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from microserve.protocol.messages.numerics import Numerics
from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.services.router.strategies import BUILT_IN
from microserve.services.simulation.engine.engine import VOCAB_SIZE
from microserve.services.simulation.faults.fates import Fault, draw_faults, draw_single, draw_slow_network
from microserve.services.simulation.faults.strategies import PROVOKING
from microserve.services.simulation.mesh import Shape

STRATEGIES = tuple(strategy.name for strategy in BUILT_IN)
RARE = tuple(strategy.name for strategy in PROVOKING)
CALM, SINGLE, STORM = "calm", "single", "storm"
SHARP, SHARP_TOO = Numerics("sharp", is_exact=True), Numerics("sharp-too", is_exact=True)
LOOSE = Numerics("loose")
QUIET_S = 0.3
"""The mesh comes together before the first fault and the first request."""
BURST_S = 0.05
"""Mean time of a request behind the start of its burst: one meets another's send, wait or queue."""


@dataclass(frozen=True)
class Arrival:
    """One request, and whether its client leaves before the end."""

    at: float
    gateway: str
    router: str
    strategy: str
    prompt: tuple[int, ...]
    params: SamplingParams
    salt: str
    cancel_after_s: float | None


@dataclass(frozen=True)
class Scenario:
    seed: int
    kind: str
    """``calm``: no fault, though messages may be slow. ``single``: one engine of several fails once.
    ``storm``: anything."""
    shape: Shape
    arrivals: list[Arrival]
    crowd: list[Arrival]
    """Come where an ambush calls for them, if one does."""
    faults: list[Fault]
    ends_at: float
    """All faults are over and everything is mended."""


def prompts() -> list[tuple[int, ...]]:
    """The pool that all seeds draw from: few, so that prefixes are shared and an oracle can remember."""
    rng = random.Random("prompts")
    stems = [tuple(rng.randrange(VOCAB_SIZE) for _ in range(40)) for _ in range(4)]
    pool = []
    for length in (1, 3, 4, 5, 8, 15, 16, 17, 24, 31, 40, 57, 72):
        for stem in stems:
            tail = tuple(rng.randrange(VOCAB_SIZE) for _ in range(length))
            pool.append((stem[: length // 2] + tail)[:length])
    return pool


_PROMPTS = prompts()
_LONG = [prompt for prompt in _PROMPTS if len(prompt) >= 40]


def draw(seed: int) -> Scenario:
    rng = random.Random(f"scenario {seed}")
    (kind,) = rng.choices((CALM, SINGLE, STORM), (1, 2, 12))
    num_engines = rng.choice((1, 2, 2, 2, 3, 3, 3, 4) if kind != SINGLE else (2, 3))
    shape = Shape(
        num_engines=num_engines,
        num_routers=rng.choice((1, 1, 1, 2)),
        num_gateways=rng.choice((1, 1, 1, 2)),
        # In a storm they may run out; elsewhere nobody may be refused for want of them.
        num_blocks=rng.choice((38, 40, 44, 64) if kind == STORM else (64, 96)),
        # Few, so that a slot is used again while writers of its last use are about.
        grant_slots=rng.choice((1, 2, 3, 16)),
        max_num_seqs=rng.choice((2, 4, 8)),
        max_num_batched_tokens=rng.choice((8, 16, 32)),
        max_waiting=rng.choice((4, 16, 64)) if kind == STORM else 64,
        credit=rng.choice((1, 4, 16)),
        # Elsewhere than in a storm no grant may end because messages are slow or engines have much to do.
        lease_s=max(rng.choice((0.2, 0.8)), 0.0 if kind == STORM else 2.0),
        # What takes time takes less than in a real mesh, so that more happens in a world.
        heartbeat_s=0.2,
        liveness=3,
        call_timeout_s=1.0 if kind == STORM else 2.0,
        drain_s=1.0,
        stuck_s=1.0,
        strategies=PROVOKING,
        labels=rng.choice(((), (), (("prefill",), ("decode",)))),
        clusters=_draw_clusters(random.Random(f"clusters {seed}"), num_engines),
        max_skew_s=rng.choice((0.0, 600.0)),
        numerics=_draw_numerics(random.Random(f"numerics {seed}"), num_engines),
    )
    last = QUIET_S + rng.uniform(0.4, 1.2)
    faults: list[Fault] = []
    if kind == STORM:
        faults = draw_faults(rng, shape, QUIET_S, last)
    elif kind == SINGLE:
        faults = [draw_single(rng, shape, QUIET_S, last)]
    else:
        faults = [draw_slow_network(rng, QUIET_S, last)]
    arrivals = _draw_arrivals(rng, kind, shape, last)
    crowd = [_draw_arrival(rng, shape, ["data_parallel", "kv_cost"], last, is_heavy=False) for _ in range(8)]
    ends_at = max([last, arrivals[-1].at, *(fault.until for fault in faults)])
    return Scenario(seed, kind, shape, arrivals, crowd, faults, ends_at)


def _draw_clusters(rng: random.Random, num_engines: int) -> tuple[str, ...]:
    """None, or one of two for each; likewise of its own lots."""
    return () if rng.random() < 0.5 else tuple(rng.choice(("near", "far")) for _ in range(num_engines))


def _draw_numerics(rng: random.Random, num_engines: int) -> tuple[Numerics, ...]:
    """Mostly one class for all. Of its own lots: what is drawn elsewhere is the same with and without."""
    if num_engines == 1 or rng.random() < 0.7:
        return ()
    kinds = (SHARP, rng.choice((SHARP_TOO, SHARP_TOO, LOOSE)))
    return tuple(rng.choice(kinds) for _ in range(num_engines))


def _draw_arrivals(rng: random.Random, kind: str, shape: Shape, last: float) -> list[Arrival]:
    # Not all at a time: what one kind of request provokes is not thinned out by all the others.
    strategies = [*rng.sample(STRATEGIES, rng.randint(1, 4)), *rng.sample(RARE, rng.randint(1, 3))]
    # A storm comes over many requests at a time; otherwise the engines must be able to keep up.
    most = 11 if kind == STORM else 3 * shape.num_engines
    # So many long ones at a time that engines run out of blocks.
    is_heavy = kind == STORM and rng.random() < 0.25
    bursts = [rng.uniform(QUIET_S, last) for _ in range(rng.randint(1, 2 if is_heavy else 4))]
    arrivals = []
    for _ in range(rng.randint(6 if is_heavy else 3, most)):
        at = rng.choice(bursts) + rng.expovariate(1 / BURST_S)
        arrivals.append(_draw_arrival(rng, shape, strategies, at, is_heavy=is_heavy))
    return sorted(arrivals, key=lambda arrival: arrival.at)


def _draw_arrival(
    rng: random.Random, shape: Shape, strategies: list[str], at: float, *, is_heavy: bool
) -> Arrival:
    is_cancelled = rng.random() < 0.2
    params = SamplingParams(
        max_tokens=40 if is_cancelled or is_heavy else rng.choice((1, 1, 2, 4, 8, 24)),
        temperature=rng.choice((0.0, 1.0)),
        seed=rng.randrange(3),
        ignore_eos=True,
        # Some stop at once, some in the middle.
        stop_token_ids=tuple(range(0, VOCAB_SIZE, rng.choice((8, 17)))) if rng.random() < 0.2 else (),
        logprobs=0 if rng.random() < 0.2 else None,
    )
    return Arrival(
        at=at,
        gateway=f"gateway-{rng.randrange(shape.num_gateways)}",
        router=f"router-{rng.randrange(shape.num_routers)}",
        strategy=rng.choice(strategies),
        prompt=rng.choice(_LONG if is_heavy else _PROMPTS),
        params=params,
        salt=rng.choice(("", "", "", "salt")),
        cancel_after_s=rng.uniform(0.0, 0.2) if is_cancelled else None,
    )
