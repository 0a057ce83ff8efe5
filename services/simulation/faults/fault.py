"""Makes the faults of a scenario happen to a mesh, and mends them again. Counts what it does."""

from __future__ import annotations

import random
from collections import Counter
from functools import partial

from microserve.protocol import log
from microserve.services.simulation.engine.engine import SimEngine
from microserve.services.simulation.engine.heap import WriteWeather
from microserve.services.simulation.faults.ambush import Ambushes
from microserve.services.simulation.faults.fates import Fault
from microserve.services.simulation.mesh import SimulatedMesh
from microserve.services.simulation.network import Weather


class Faults:
    """``begin`` and ``end`` each fault at its times, then ``mend`` everything."""

    def __init__(self, mesh: SimulatedMesh, seed: int) -> None:
        self.counts: Counter[str] = Counter()
        """Of processes, clocks and connections; messages and writes are counted where they are made."""
        self._mesh = mesh
        self._rng = random.Random(f"faults {seed}")
        self.ambushes = Ambushes(mesh, self.counts, self._kill_if_alive)

    def begin(self, fault: Fault) -> None:
        mesh, name = self._mesh, fault.target
        mesh.journal.note("sim.fault", kind=fault.kind, target=name, other=fault.other, number=fault.number)
        seat = mesh.seats.get(name)
        match fault.kind:
            case "kill":
                self._take_counts(name)
                self.counts["kill"] += seat is not None and seat.is_alive
                mesh.kill(name)
            case "drain":
                self.counts["drain"] += seat is not None and seat.is_alive
                mesh.terminate(name)
            case "freeze" if seat is not None and seat.process is not None:
                self.counts["freeze"] += 1
                seat.process.freeze()
            case "partition":
                self.counts["partition"] += 1
                mesh.network.block(name, fault.other, lossy=bool(fault.number))
            case "cut":
                self._cut(name)
            case "jump" if seat is not None and seat.process is not None:
                self.counts["jump"] += 1
                seat.process.jump(fault.number)
            case "weather" if fault.weather is not None:
                mesh.network.weather = fault.weather
            case "writes" if fault.writes is not None and seat is not None:
                if isinstance(seat.service, SimEngine):
                    seat.service.faults.weather = fault.writes
            case "snag" if seat is not None and isinstance(seat.service, SimEngine):
                seat.service.faults.snag = partial(self._snag, fault, seat.service)
            case "exhaust":
                self.counts["exhaust"] += 1
                self._exhaust(name)
            case "slow" if seat is not None and isinstance(seat.service, SimEngine):
                self.counts["slow"] += 1
                seat.service.pacer.slowness = fault.number
            case "ambush":
                self.ambushes.lay(fault)

    def end(self, fault: Fault) -> None:
        mesh, name = self._mesh, fault.target
        seat = mesh.seats.get(name)
        match fault.kind:
            case "kill":
                mesh.start(name)
            case "exhaust":
                self._relieve(name)
            case "snag" if seat is not None and isinstance(seat.service, SimEngine):
                seat.service.faults.snag = None
            case "freeze" if seat is not None and seat.process is not None:
                mesh.journal.note("sim.thawed", seat=name)
                seat.process.thaw()
            case "partition":
                mesh.network.unblock(name, fault.other)
            case "weather":
                mesh.network.weather = Weather()
            case "writes" if seat is not None and isinstance(seat.service, SimEngine):
                seat.service.faults.weather = WriteWeather()
            case "slow" if seat is not None and isinstance(seat.service, SimEngine):
                seat.service.pacer.slowness = 1.0
                seat.service.pacer.hurry()
            case "ambush":
                self.ambushes.lift(fault)

    def _snag(self, fault: Fault, engine: SimEngine) -> None:
        """The engine stands in the middle of a write: it dies here, or sleeps for ``number`` seconds."""
        mesh = self._mesh
        mesh.journal.note("sim.snag", number=fault.number)
        if fault.number:
            engine.process.freeze()
            mesh.loop.at(mesh.loop.now + fault.number, engine.process.thaw)
        else:
            mesh.loop.at(mesh.loop.now, self._kill_if_alive, fault.target, engine)
            mesh.loop.at(fault.until, mesh.start, fault.target)

    def _kill_if_alive(self, name: str, engine: SimEngine) -> None:
        if self._mesh.seats[name].service is engine:
            self._take_counts(name)
            self._mesh.kill(name)

    def _exhaust(self, name: str) -> None:
        """It keeps the descriptors that it has, and gets no other: neither connections nor peers' heaps."""
        mesh = self._mesh
        mesh.journal.excused |= {log.TURN_FAILED}
        mesh.addresses.exhausted.add(name)
        service = mesh.seats[name].service
        if isinstance(service, SimEngine):
            service.faults.exhausted = True

    def _relieve(self, name: str) -> None:
        self._mesh.addresses.exhausted.discard(name)
        service = self._mesh.seats[name].service
        if isinstance(service, SimEngine):
            service.faults.exhausted = False

    def mend(self) -> None:
        """End of all faults: what was dead starts, what was frozen goes on, every way is free."""
        mesh = self._mesh
        mesh.journal.note("sim.mended")
        self.ambushes.lift_all()
        mesh.network.weather = Weather()
        mesh.network.unblock_all()
        for name, seat in mesh.seats.items():
            self._relieve(name)
            if seat.process is not None:
                seat.process.thaw()
            if isinstance(seat.service, SimEngine):
                seat.service.faults.weather = WriteWeather()
                seat.service.faults.snag = None
                seat.service.pacer.slowness = 1.0
                seat.service.pacer.hurry()
            mesh.start(name)

    def total(self) -> Counter[str]:
        """Every fault so far, by kind."""
        for name in self._mesh.engines:
            self._take_counts(name)
        return self.counts + self._mesh.network.faults

    def _take_counts(self, name: str) -> None:
        """A dead engine's count of its writes' faults would go with it."""
        service = self._mesh.seats[name].service
        if isinstance(service, SimEngine):
            self.counts += service.faults.counts
            service.faults.counts.clear()

    def _cut(self, name: str) -> None:
        """Break about half of a process's connections."""
        mesh = self._mesh
        mine = [
            client
            for client in mesh.addresses.clients
            if client.process.name == name or client.address.startswith(mesh.address(name))
        ]
        for client in mine:
            if self._rng.random() < 0.5:
                self.counts["cut"] += 1
                client.cut()
