"""Faults that wait for a moment: as soon as a lane is claimed, say, its writer freezes.

Chance alone seldom hits the milliseconds in which a bug can show. Owns who lies in wait for which moment of
the witness (../witness.py), and what befalls writer, receiver, their ways to routers, or the client then.
What is drawn is fates.py's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial

from microserve.services.simulation.engine.engine import SimEngine
from microserve.services.simulation.engine.witness import Lane, Moment
from microserve.services.simulation.faults.fates import Fault
from microserve.services.simulation.mesh import Seat, SimulatedMesh

STOP_S = 1e-6
"""A step that is to stand where it is waits so long; its process is frozen or dead by then."""
NEWS_S = 0.002
"""What the writer tells its router of a step is there by then: the death comes behind it."""
UNDER_LOCK = (Moment.FIRST_TOKEN, Moment.LET_GO)
"""Here the writer's lock is held, and its step cannot stand still: what befalls it comes just behind."""


class Ambushes:
    """``lay`` one, ``lift`` it; the witness says when."""

    def __init__(
        self, mesh: SimulatedMesh, counts: Counter[str], kill: Callable[[str, SimEngine], None]
    ) -> None:
        self.crowd: Callable[[], None] = lambda: None
        """Makes a few more requests come at once."""
        self._mesh = mesh
        self._counts = counts
        self._kill = kill
        self._waiting: list[Fault] = []
        self._skipped: Counter[int] = Counter()
        mesh.witness.watcher = self._look

    def lay(self, fault: Fault) -> None:
        self._waiting.append(fault)

    def lift(self, fault: Fault) -> None:
        if fault in self._waiting:
            self._waiting.remove(fault)

    def lift_all(self) -> None:
        self._waiting.clear()

    def _look(self, moment: Moment, writer: int, lane: Lane, generation: int) -> None:
        for fault in self._waiting:
            if fault.target != moment.value or not self._is_worth(fault, writer, lane, generation):
                continue
            self._skipped[id(fault)] += 1
            if self._skipped[id(fault)] > fault.skip:
                self._waiting.remove(fault)
                self._spring(fault, moment, writer, lane, generation)
                return

    def _is_worth(self, fault: Fault, writer: int, lane: Lane, generation: int) -> bool:
        """A crowd is for a receiver that will start on its own share before all is here; what is ``at last``,
        for a first token that is the last one too."""
        is_crowd, is_last = fault.other.startswith("crowd"), fault.other.endswith("at last")
        if not is_crowd and not is_last:
            return True
        seat, table = self._seat(lane.receiver), self._mesh.witness.table_of(lane)
        if seat is None or table is None or table.stage(lane.slot, generation) != "open":
            return False
        grant_id, state = table.grant_id(lane.slot, generation), seat.service.core.state
        received = [each for each in state.receiving if each.received and each.received.grant_id == grant_id]
        if is_last:
            return any(each.params.max_tokens == each.num_output_tokens + 1 for each in received)
        is_idle = not state.scheduler.running and not state.scheduler.waiting and writer != lane.receiver
        return is_idle and any(
            each.received.grant.end < each.num_tokens and table.layer_complete(grant_id, 0)
            for each in received
        )

    def _spring(self, fault: Fault, moment: Moment, writer: int, lane: Lane, generation: int) -> None:
        mesh, (what, whom) = self._mesh, (*fault.other.split(), "")[:2]
        seat = self._seat(writer if whom == "writer" else lane.receiver)
        mesh.journal.note("sim.ambush", moment=moment.value, other=fault.other, number=fault.number)
        if seat is None:
            return
        self._counts["ambush"] += 1
        match what:
            case "crowd":
                self.crowd()
                self._stand(seat, fault.number)
            case "stall":
                self._stand(seat, fault.number)
            case "freeze":
                self._freeze(seat, fault)
            case "kill":
                self._freeze(seat, fault)
                after_s = NEWS_S if moment in UNDER_LOCK else 0.0
                mesh.loop.at(mesh.loop.now + after_s, self._kill, seat.name, seat.service)
                mesh.loop.at(mesh.loop.now + fault.number, mesh.start, seat.name)
            case "mute" | "deafen":
                for router in mesh.routers:
                    way = (seat.name, router) if what == "mute" else (router, seat.name)
                    mesh.network.block(*way, lossy=True)
                    mesh.loop.at(mesh.loop.now + fault.number, mesh.network.unblock, *way)
            case "leave":
                self._leave(lane, generation)
        if whom == "writer" and what in ("freeze", "kill") and moment not in UNDER_LOCK:
            self._stand(seat, STOP_S)

    def _freeze(self, seat: Seat, fault: Fault) -> None:
        process = seat.process
        if process is not None:
            process.freeze()
            self._mesh.loop.at(self._mesh.loop.now + fault.number, process.thaw)

    def _stand(self, seat: Seat, seconds: float) -> None:
        """Its step goes on after that long; only where it holds no lock."""
        if isinstance(seat.service, SimEngine):
            seat.service.pacer.sleep(seconds)

    def _leave(self, lane: Lane, generation: int) -> None:
        """The client whose KV it is goes away."""
        table = self._mesh.witness.table_of(lane)
        if table is None or table.stage(lane.slot, generation) not in ("open", "sealed"):
            return
        # A gateway names a request that it moves by its client's id and a number.
        request_id = table.request_of(table.grant_id(lane.slot, generation)).partition("~")[0]
        for gateway in self._mesh.living(self._mesh.gateways):
            answer = gateway.answers.get(request_id)
            if answer is not None and not answer.outcome:
                self._mesh.loop.at(self._mesh.loop.now, partial(gateway.cancel, answer))

    def _seat(self, incarnation: int) -> Seat | None:
        for name in self._mesh.engines:
            seat = self._mesh.seats[name]
            if seat.is_alive and seat.service is not None and seat.service.core.incarnation == incarnation:
                return seat
        return None
