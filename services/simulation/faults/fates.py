"""What befalls a mesh: the faults of one world, drawn from its generator.

Owns the kinds of faults and how often each is drawn; fault.py makes them happen. A new kind (a log that
cannot be written, say) is a draw in ``_DRAWS``, and its begin and end in fault.py.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from microserve.services.simulation.engine.heap import WriteWeather
from microserve.services.simulation.engine.witness import Moment
from microserve.services.simulation.mesh import INDEX, Shape
from microserve.services.simulation.network import Weather

MAX_FAULT_S = 0.8
"""Most faults are over by then; who is silent for 0.6 s is missed (scenario.py)."""
FREEZES_S = (0.05, 0.3, 0.7, 1.0)
SINGLE_S = 1.0
SILENT_S = 3.2
"""Where more is promised, longer than any request may take (judge.py): nobody may wait for it to end."""


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
    skip: int = 0
    """Of an ambush: moments that it lets pass."""


@dataclass(frozen=True)
class _Lot:
    """What one draw starts from."""

    rng: random.Random
    engines: list[str]
    everyone: list[str]
    begin: float
    end: float
    """When the first fault may come, and the last."""
    at: float
    until: float

    def anyone(self) -> str:
        """Engines are where the KV is: most faults go there."""
        weights = [6 if name in self.engines else 1 for name in self.everyone]
        return self.rng.choices(self.everyone, weights)[0]

    def engine(self) -> str:
        return self.rng.choice(self.engines)

    def chance(self, most: float) -> float:
        return self.rng.choice((0.0, 0.0, most / 10, most))


def _kill(lot: _Lot) -> Fault:
    return Fault(lot.at, lot.until, "kill", lot.anyone())


def _drain(lot: _Lot) -> Fault:
    return Fault(lot.at, lot.until, "drain", lot.engine())


def _freeze(lot: _Lot) -> Fault:
    return Fault(lot.at, lot.at + lot.rng.choice(FREEZES_S), "freeze", lot.anyone())


def _partition(lot: _Lot) -> Fault:
    target = lot.anyone()
    other = lot.rng.choice([name for name in lot.everyone if name != target])
    source, sink = lot.rng.sample([target, other], 2)
    return Fault(lot.at, lot.until, "partition", source, sink, number=float(lot.rng.random() < 0.5))


def _cut(lot: _Lot) -> Fault:
    return Fault(lot.at, lot.at, "cut", lot.anyone())


def _jump(lot: _Lot) -> Fault:
    return Fault(lot.at, lot.at, "jump", lot.anyone(), number=lot.rng.choice((0.1, 0.7, 30.0)))


def _weather(lot: _Lot) -> Fault:
    weather = Weather(
        drop=lot.chance(0.05),
        duplicate=lot.chance(0.3),
        reorder=lot.chance(0.05),
        delay=lot.chance(0.3),
        max_delay_s=lot.rng.choice((0.01, 0.15)),
    )
    return Fault(lot.at, max(lot.until, lot.end), "weather", "", weather=weather)


def _writes(lot: _Lot) -> Fault:
    writes = WriteWeather(
        torn=lot.chance(0.5),
        pause=lot.chance(0.5),
        max_pause_s=lot.rng.choice((0.005, 0.05, 0.3)),
        lost_write=lot.chance(0.1),
        doubled_write=lot.chance(0.3),
        lost_signal=lot.chance(0.05),
        doubled_signal=lot.chance(0.3),
        bent=lot.chance(0.1),
    )
    return Fault(lot.at, lot.until, "writes", lot.engine(), writes=writes)


def _slow(lot: _Lot) -> Fault:
    return Fault(lot.at, lot.until, "slow", lot.engine(), number=lot.rng.choice((3.0, 20.0, 60.0)))


def _snag(lot: _Lot) -> Fault:
    number = lot.rng.choice((0.0, 0.2, 1.0))
    return Fault(lot.at, lot.at + max(number, 0.6), "snag", lot.engine(), number=number)


AMBUSHES = {
    Moment.CLAIM: ("stall writer", "freeze writer", "kill receiver", "mute receiver", "leave"),
    Moment.ROWS: ("stall writer", "freeze writer", "kill writer", "kill receiver", "leave"),
    # A receiver that starts early waits here, until others want to run.
    Moment.LAYER: ("crowd writer", "crowd writer", "crowd writer", "freeze writer", "kill writer", "leave"),
    Moment.WHOLE: ("stall writer", "freeze writer", "kill writer", "freeze receiver", "leave"),
    # The client has its first token from the sender, and who was to go on is gone.
    Moment.FIRST_TOKEN: ("kill receiver at last", "freeze receiver at last", "mute receiver", "leave"),
    Moment.LET_GO: ("kill writer", "mute writer", "deafen receiver", "leave"),
}
"""What may befall whom at a moment: each leads into meetings that chance alone seldom makes."""
OFTEN = (Moment.LAYER, Moment.LAYER, Moment.FIRST_TOKEN)
"""Moments that lie in the hat once more: what follows there is met too seldom otherwise."""


def _ambush(lot: _Lot) -> Fault:
    """Laid before the first requests come, so that most find somebody."""
    moment = lot.rng.choice((*AMBUSHES, *OFTEN))
    other = lot.rng.choice(AMBUSHES[moment])
    is_rare = other.startswith("crowd") or other.endswith("at last")
    skip = 0 if is_rare else lot.rng.choice((0, 0, 1, 2, 4))
    number = lot.rng.choice((0.02, 0.1, 0.3, 0.7, 1.0))
    return Fault(lot.begin, lot.until, "ambush", moment.value, other, number, skip=skip)


_DRAWS: dict[str, Callable[[_Lot], Fault]] = {
    "kill": _kill,
    "drain": _drain,
    "freeze": _freeze,
    "partition": _partition,
    "cut": _cut,
    "jump": _jump,
    "weather": _weather,
    "writes": _writes,
    "slow": _slow,
    "snag": _snag,
    "ambush": _ambush,
}
FAULT_KINDS = tuple(_DRAWS)
SHARES = {"drain": 2, "weather": 2, "writes": 2, "snag": 2, "ambush": 6}
"""How often a kind lies in the hat; 1 without an entry."""


def draw_faults(rng: random.Random, shape: Shape, begin: float, end: float) -> list[Fault]:
    """A storm: some kinds of faults and not the others, each a few times."""
    engines = [f"engine-{n}" for n in range(shape.num_engines)]
    others = [INDEX] + [f"router-{n}" for n in range(shape.num_routers)]
    others += [f"gateway-{n}" for n in range(shape.num_gateways)]
    hat = [kind for kind in FAULT_KINDS for _ in range(SHARES.get(kind, 1))]
    faults = []
    for kind in rng.sample(hat, rng.randint(1, 6)):
        for _ in range(rng.randint(1, 4)):
            at = rng.uniform(begin, end)
            until = at + rng.uniform(0.05, MAX_FAULT_S)
            faults.append(_DRAWS[kind](_Lot(rng, engines, engines + others, begin, end, at, until)))
    return sorted(faults, key=lambda fault: fault.at)


def draw_single(rng: random.Random, shape: Shape, begin: float, end: float) -> Fault:
    """One engine of several fails once, or a router cannot reach it or hear it."""
    at, engine = rng.uniform(begin, end), f"engine-{rng.randrange(shape.num_engines)}"
    kind = rng.choice(("kill", "freeze", "drain", "partition"))
    if kind != "partition":
        return Fault(at, at + (SILENT_S if kind == "freeze" else SINGLE_S), kind, engine)
    source, sink = rng.sample((engine, f"router-{rng.randrange(shape.num_routers)}"), 2)
    return Fault(at, at + SILENT_S, kind, source, sink, number=float(rng.random() < 0.5))


def draw_slow_network(rng: random.Random, begin: float, end: float) -> Fault:
    """Messages are late, and in order: no fault."""
    slow = Weather(delay=rng.choice((0.0, 0.1, 0.5)), max_delay_s=rng.choice((0.01, 0.1)))
    return Fault(begin, end, "weather", "", weather=slow)
