"""Makes the faults of a scenario happen to a world, and mends them again. Counts what it does."""

from __future__ import annotations

import random
from collections import Counter
from functools import partial

from microserve.services.simulation.engine import SimEngine
from microserve.services.simulation.faults.scenario import Fault
from microserve.services.simulation.heap import WriteWeather
from microserve.services.simulation.network import Weather
from microserve.services.simulation.world import World


class Faults:
    """``begin`` and ``end`` each fault at its times, then ``mend`` everything."""

    def __init__(self, world: World, seed: int) -> None:
        self.counts: Counter[str] = Counter()
        """Of processes, clocks and connections; messages and writes are counted where they are made."""
        self._world = world
        self._rng = random.Random(f"faults {seed}")
        self._counted: set[int] = set()

    def begin(self, fault: Fault) -> None:
        world, name = self._world, fault.target
        world.journal.note("sim.fault", kind=fault.kind, target=name, other=fault.other, number=fault.number)
        seat = world.seats.get(name)
        match fault.kind:
            case "kill":
                self._take_counts(name)
                self.counts["kill"] += seat is not None and seat.is_alive
                world.kill(name)
            case "drain":
                self.counts["drain"] += seat is not None and seat.is_alive
                world.terminate(name)
            case "freeze" if seat is not None and seat.process is not None:
                self.counts["freeze"] += 1
                seat.process.freeze()
            case "partition":
                self.counts["partition"] += 1
                world.network.block(name, fault.other, lossy=bool(fault.number))
            case "cut":
                self._cut(name)
            case "jump" if seat is not None and seat.process is not None:
                self.counts["jump"] += 1
                seat.process.jump(fault.number)
            case "weather" if fault.weather is not None:
                world.network.weather = fault.weather
            case "writes" if fault.writes is not None and seat is not None:
                if isinstance(seat.service, SimEngine):
                    seat.service.faults.weather = fault.writes
            case "snag" if seat is not None and isinstance(seat.service, SimEngine):
                seat.service.faults.snag = partial(self._snag, fault, seat.service)
            case "slow" if seat is not None and isinstance(seat.service, SimEngine):
                self.counts["slow"] += 1
                seat.service.pacer.slowness = fault.number

    def end(self, fault: Fault) -> None:
        world, name = self._world, fault.target
        seat = world.seats.get(name)
        match fault.kind:
            case "kill":
                world.start(name)
            case "snag" if seat is not None and isinstance(seat.service, SimEngine):
                seat.service.faults.snag = None
            case "freeze" if seat is not None and seat.process is not None:
                world.journal.note("sim.thawed", seat=name)
                seat.process.thaw()
            case "partition":
                world.network.unblock(name, fault.other)
            case "weather":
                world.network.weather = Weather()
            case "writes" if seat is not None and isinstance(seat.service, SimEngine):
                seat.service.faults.weather = WriteWeather()
            case "slow" if seat is not None and isinstance(seat.service, SimEngine):
                seat.service.pacer.slowness = 1.0
                seat.service.pacer.hurry()

    def _snag(self, fault: Fault, engine: SimEngine) -> None:
        """The engine stands in the middle of a write: it dies here, or sleeps for ``number`` seconds."""
        world = self._world
        world.journal.note("sim.snag", number=fault.number)
        if fault.number:
            engine.process.freeze()
            world.loop.at(world.loop.now + fault.number, engine.process.thaw)
        else:
            world.loop.at(world.loop.now, self._kill_if_alive, fault.target, engine)
            world.loop.at(fault.until, world.start, fault.target)

    def _kill_if_alive(self, name: str, engine: SimEngine) -> None:
        if self._world.seats[name].service is engine:
            self._take_counts(name)
            self._world.kill(name)

    def mend(self) -> None:
        """End of all faults: what was dead starts, what was frozen goes on, every way is free."""
        world = self._world
        world.journal.note("sim.mended")
        world.network.weather = Weather()
        world.network.unblock_all()
        for name, seat in world.seats.items():
            if seat.process is not None:
                seat.process.thaw()
            if isinstance(seat.service, SimEngine):
                seat.service.faults.weather = WriteWeather()
                seat.service.faults.snag = None
                seat.service.pacer.slowness = 1.0
                seat.service.pacer.hurry()
            world.start(name)

    def total(self) -> Counter[str]:
        """Every fault so far, by kind."""
        for name in self._world.engines:
            self._take_counts(name)
        return self.counts + self._world.network.faults

    def _take_counts(self, name: str) -> None:
        """A dead engine's count of its writes' faults would go with it."""
        service = self._world.seats[name].service
        if isinstance(service, SimEngine):
            self.counts += service.faults.counts
            service.faults.counts.clear()

    def _cut(self, name: str) -> None:
        """Break about half of a process's connections."""
        world = self._world
        mine = [
            client
            for client in world.addresses.clients
            if client.process.name == name or client.address.startswith(world.address(name))
        ]
        for client in mine:
            if self._rng.random() < 0.5:
                self.counts["cut"] += 1
                client.cut()
