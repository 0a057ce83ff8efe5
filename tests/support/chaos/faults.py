"""Faults by seed: killed, frozen, drained and cut off, one Poisson process over the whole mesh.

The plan is the seed's alone; a fault whose victim has one already, or that would take the last engine or the
last router away, is skipped and counted.
"""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.support.chaos.mesh import ChaosMesh

MIN_ENGINES = 1
FOUND_S = 5.0
"""A host that is heard again counts as away for so long: connections are tried again every two seconds."""
REJOIN_S = 1.0
"""A service that is back counts as down for so long: its peers have to find it again."""

WEIGHTS = {
    ("kill", "engine"): 6,
    ("kill", "router"): 2,
    ("kill", "index"): 2,
    ("kill", "gateway"): 1,
    ("freeze", "engine"): 4,
    ("freeze", "router"): 2,
    ("freeze", "index"): 1,
    ("freeze", "gateway"): 1,
    ("blink", "engine"): 4,
    ("blink", "router"): 2,
    ("blink", "index"): 1,
    ("blink", "gateway"): 1,
    ("drain", "engine"): 3,
    ("cut", ""): 6,
}
"""``freeze`` outlives liveness and lease, ``blink`` neither; ``cut`` closes any one connection."""
BETWEEN_HOSTS = {
    **{(kind, target): weight for (kind, target), weight in WEIGHTS.items() if kind != "cut"},
    ("unplug", "engine"): 6,
    ("deafen", "engine"): 4,
    ("mute", "engine"): 4,
    ("vanish", "engine"): 4,
}
"""And what befalls an engine's host: its cable pulled, what it is told or what it says lost on the way, its
power gone."""
LINKS = ("unplug", "deafen", "mute")


@dataclass(frozen=True)
class PlannedFault:
    at_s: float
    kind: str
    target: str
    """Kind of service; empty for a cut."""
    pick: int
    """Chooses the victim among those there are."""
    duration_s: float


@dataclass
class Fault:
    """One that was done. Times are monotonic seconds."""

    kind: str
    victims: tuple[str, ...]
    """The service, or both ends of a connection (``client`` is the harness)."""
    at: float
    until: float = float("inf")
    """When the victim was ready again, or thawed; a cut has no length."""

    @property
    def name(self) -> str:
        return f"{self.kind} {'-'.join(self.victims)}"

    def line(self, origin: float) -> dict[str, Any]:
        until_s = None if self.until == float("inf") else round(self.until - origin, 3)
        return {"fault": self.kind, "of": self.victims, "at": round(self.at - origin, 3), "until": until_s}


Weights = Mapping[tuple[str, str], int]


def plan_faults(seconds: float, rate: float, seed: int, weights: Weights = WEIGHTS) -> list[PlannedFault]:
    """``rate``: faults a second, on average."""
    rng = random.Random(f"faults {seed}")
    plans = []
    at_s = rng.expovariate(rate)
    while at_s < seconds:
        kind, target = rng.choices(list(weights), list(weights.values()))[0]
        duration_s = rng.uniform(4.0, 8.0) if kind == "freeze" else rng.uniform(0.2, 1.0)
        if kind in LINKS:  # shorter than liveness, or longer than TCP's patience
            duration_s = rng.uniform(0.5, 8.0)
        plans.append(PlannedFault(at_s, kind, target, rng.randrange(1 << 30), duration_s))
        at_s += rng.expovariate(rate)
    return plans


@dataclass
class Faults:
    mesh: ChaosMesh
    done: list[Fault] = field(default_factory=list)
    skipped: int = 0
    broken: list[str] = field(default_factory=list)
    """Promises of a single service that were not kept: no clean exit, no start."""

    async def run(self, plans: list[PlannedFault]) -> None:
        """Returns when the last victim is back."""
        started_at = time.monotonic()
        async with asyncio.TaskGroup() as tasks:
            for plan in plans:
                await asyncio.sleep(max(0.0, started_at + plan.at_s - time.monotonic()))
                tasks.create_task(self.do(plan))

    async def do(self, plan: PlannedFault) -> None:
        if plan.kind == "cut":
            self._cut(plan)
            return
        victim = self._victim(plan)
        if victim is None:
            self.skipped += 1
            return
        fault = Fault(plan.kind, (victim,), time.monotonic())
        self.done.append(fault)
        self.mesh.down.add(victim)
        try:
            match plan.kind:
                case "kill":
                    self.mesh.kill(victim)
                    await self._back(victim, plan.duration_s)
                case "drain":
                    code = await self.mesh.drain(victim)
                    if code != 0:
                        self.broken.append(f"{victim}: exit code {code} after SIGTERM")
                    await self._back(victim, plan.duration_s)
                case "vanish":
                    self.mesh.harm(plan.kind, victim)
                    await self._back(victim, plan.duration_s)
                case "unplug" | "deafen" | "mute":
                    self.mesh.harm(plan.kind, victim)
                    await asyncio.sleep(plan.duration_s)
                    self.mesh.heal(victim)
                    await asyncio.sleep(FOUND_S)
                case _:
                    self.mesh.send_signal(victim, signal.SIGSTOP)
                    await asyncio.sleep(plan.duration_s)
                    self.mesh.send_signal(victim, signal.SIGCONT)
            fault.until = time.monotonic()
            await asyncio.sleep(REJOIN_S)
        except (TimeoutError, RuntimeError) as error:
            self.broken.append(f"{fault.name}: {error or 'no exit in time'}")
            return  # it stays down
        self.mesh.down.discard(victim)

    async def _back(self, victim: str, pause_s: float) -> None:
        await asyncio.sleep(pause_s)
        await self.mesh.restart(victim)

    def _victim(self, plan: PlannedFault) -> str | None:
        there = sorted(self.mesh.alive(plan.target))
        spare = {"engine": MIN_ENGINES, "router": 1}.get(plan.target, 0)
        return there[plan.pick % len(there)] if len(there) > spare else None

    def _cut(self, plan: PlannedFault) -> None:
        ends = self.mesh.cut(random.Random(plan.pick))
        if ends is None:
            self.skipped += 1
            return
        now = time.monotonic()
        self.done.append(Fault("cut", ends, now, now))
