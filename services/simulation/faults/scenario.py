"""What a seed means: the size of a mesh, the requests that come, the faults that befall it.

Pure: a scenario is drawn from its seed alone and can be printed. Most are storms: each takes a few kinds of
faults and leaves the others out (swarm testing: combinations that a fixed mix never makes). Some are calm,
and some have one single failing engine: there more is promised, and checked.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from microserve.protocol.messages.sampling import SamplingParams
from microserve.services.router.strategies import BUILT_IN
from microserve.services.simulation.engine import VOCAB_SIZE
from microserve.services.simulation.heap import WriteWeather
from microserve.services.simulation.mesh import INDEX, Shape
from microserve.services.simulation.network import Weather

STRATEGIES = tuple(strategy.name for strategy in BUILT_IN)
CALM, SINGLE, STORM = "calm", "single", "storm"
FAULT_KINDS = (
    "kill",
    "drain",
    "freeze",
    "partition",
    "cut",
    "jump",
    "weather",
    "writes",
    "slow",
    "snag",
)
QUIET_S = 1.0
"""The mesh comes together before the first fault and the first request."""


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
class Fault:
    """From ``at`` to ``until``, in virtual seconds."""

    at: float
    until: float
    kind: str
    target: str
    other: str = ""
    number: float = 0.0
    weather: Weather | None = None
    writes: WriteWeather | None = None


@dataclass(frozen=True)
class Scenario:
    seed: int
    kind: str
    """``calm``: no fault, though messages may be slow. ``single``: one engine of several fails once.
    ``storm``: anything."""
    shape: Shape
    arrivals: list[Arrival]
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


def draw(seed: int) -> Scenario:
    rng = random.Random(f"scenario {seed}")
    (kind,) = rng.choices((CALM, SINGLE, STORM), (1, 2, 12))
    shape = Shape(
        num_engines=rng.choice((1, 2, 2, 3, 3, 4) if kind != SINGLE else (2, 3)),
        num_routers=rng.choice((1, 1, 2)),
        num_gateways=rng.choice((1, 1, 2)),
        num_blocks=rng.choice((44, 48, 64, 128)),
        grant_slots=rng.choice((2, 8, 16)),
        max_num_seqs=rng.choice((2, 4, 8)),
        max_num_batched_tokens=rng.choice((8, 16, 32)),
        max_waiting=rng.choice((4, 16, 64)) if kind == STORM else 64,
        credit=rng.choice((1, 4, 16)),
        lease_s=rng.choice((0.5, 2.0)),
        labels=rng.choice(((), (), (("prefill",), ("decode",)))),
        max_skew_s=rng.choice((0.0, 600.0)),
    )
    last = QUIET_S + rng.uniform(2.0, 6.0)
    faults: list[Fault] = []
    if kind == STORM:
        faults = _draw_faults(rng, shape, last)
    elif kind == SINGLE:
        faults = [_draw_single(rng, shape, last)]
    else:  # a slow network is no fault
        slow = Weather(delay=rng.choice((0.0, 0.1, 0.5)), max_delay_s=rng.choice((0.01, 0.1)))
        faults = [Fault(QUIET_S, last, "weather", "", weather=slow)]
    ends_at = max([last, *(fault.until for fault in faults)])
    return Scenario(seed, kind, shape, _draw_arrivals(rng, kind, shape, last), faults, ends_at)


def _draw_arrivals(rng: random.Random, kind: str, shape: Shape, last: float) -> list[Arrival]:
    # Not all at a time: what one kind of request provokes is not thinned out by all the others.
    strategies = rng.sample(STRATEGIES, rng.randint(3, 8))
    arrivals = []
    # A storm comes over many requests at a time; otherwise the engines must be able to keep up.
    most = 24 if kind == STORM else 6 * shape.num_engines
    for _ in range(rng.randint(6, most)):
        is_cancelled = rng.random() < 0.2
        params = SamplingParams(
            max_tokens=80 if is_cancelled else rng.choice((1, 2, 6, 12, 30, 60)),
            temperature=rng.choice((0.0, 1.0)),
            seed=rng.randrange(3),
            ignore_eos=True,
            stop_token_ids=tuple(range(0, VOCAB_SIZE, 17)) if rng.random() < 0.2 else (),
            logprobs=0 if rng.random() < 0.2 else None,
        )
        arrivals.append(
            Arrival(
                at=rng.uniform(QUIET_S, last),
                gateway=f"gateway-{rng.randrange(shape.num_gateways)}",
                router=f"router-{rng.randrange(shape.num_routers)}",
                strategy=rng.choice(strategies),
                prompt=rng.choice(_PROMPTS),
                params=params,
                salt=rng.choice(("", "", "", "salt")),
                cancel_after_s=rng.uniform(0.0, 0.4) if is_cancelled else None,
            )
        )
    return sorted(arrivals, key=lambda arrival: arrival.at)


# --- faults ----------------------------------------------------------------------------------------


def _draw_faults(rng: random.Random, shape: Shape, last: float) -> list[Fault]:
    engines = [f"engine-{n}" for n in range(shape.num_engines)]
    others = [INDEX] + [f"router-{n}" for n in range(shape.num_routers)]
    others += [f"gateway-{n}" for n in range(shape.num_gateways)]
    everyone = engines + others
    kinds = [
        "kill",
        "drain",
        "freeze",
        "partition",
        "cut",
        "jump",
        "weather",
        "writes",
        "slow",
        "snag",
        "snag",
    ]
    chosen = rng.sample(kinds, rng.randint(1, 6))
    # Engines are where the KV is: most faults go there.
    weights = [6 if name in engines else 1 for name in everyone]
    faults = []
    for kind in chosen:
        for _ in range(rng.randint(1, 4)):
            at = rng.uniform(QUIET_S, last)
            (target,) = rng.choices(everyone, weights)
            until = at + rng.uniform(0.05, 2.5)
            match kind:
                case "kill":
                    faults.append(Fault(at, until, kind, target))
                case "drain":
                    faults.append(Fault(at, until, kind, rng.choice(engines)))
                case "freeze":
                    faults.append(Fault(at, at + rng.choice((0.05, 0.5, 2.0, 4.0)), kind, target))
                case "partition":
                    other = rng.choice([name for name in everyone if name != target])
                    source, sink = rng.sample([target, other], 2)
                    faults.append(Fault(at, until, kind, source, sink, number=float(rng.random() < 0.5)))
                case "cut":
                    faults.append(Fault(at, at, kind, target))
                case "jump":
                    faults.append(Fault(at, at, kind, target, number=rng.choice((0.3, 2.0, 30.0))))
                case "weather":
                    until = at + rng.uniform(0.5, 4.0)
                    faults.append(Fault(at, until, kind, "", weather=_draw_weather(rng)))
                case "writes":
                    faults.append(Fault(at, until, kind, rng.choice(engines), writes=_draw_writes(rng)))
                case "snag":
                    number = rng.choice((0.0, 0.3, 4.0, 4.0))
                    until = at + max(number, 1.0)
                    faults.append(Fault(at, until, kind, rng.choice(engines), number=number))
                case "slow":
                    factor = rng.choice((3.0, 20.0, 100.0))
                    faults.append(Fault(at, until, kind, rng.choice(engines), number=factor))
    return sorted(faults, key=lambda fault: fault.at)


def _draw_single(rng: random.Random, shape: Shape, last: float) -> Fault:
    """One engine of several fails once, or a router cannot reach it or hear it."""
    at, engine = rng.uniform(QUIET_S, last), f"engine-{rng.randrange(shape.num_engines)}"
    kind = rng.choice(("kill", "freeze", "drain", "partition"))
    if kind != "partition":
        return Fault(at, at + 4.0, kind, engine)
    source, sink = rng.sample((engine, f"router-{rng.randrange(shape.num_routers)}"), 2)
    return Fault(at, at + 4.0, kind, source, sink, number=float(rng.random() < 0.5))


def _draw_weather(rng: random.Random) -> Weather:
    def chance(most: float) -> float:
        return rng.choice((0.0, 0.0, most / 10, most))

    return Weather(
        drop=chance(0.05),
        duplicate=chance(0.3),
        reorder=chance(0.05),
        delay=chance(0.3),
        max_delay_s=rng.choice((0.01, 0.3)),
    )


def _draw_writes(rng: random.Random) -> WriteWeather:
    def chance(most: float) -> float:
        return rng.choice((0.0, 0.0, most / 10, most))

    return WriteWeather(
        torn=chance(0.5),
        pause=chance(0.5),
        max_pause_s=rng.choice((0.005, 0.05, 0.5)),
        lost_write=chance(0.1),
        doubled_write=chance(0.3),
        lost_signal=chance(0.05),
        doubled_signal=chance(0.3),
        bent=chance(0.1),
    )
