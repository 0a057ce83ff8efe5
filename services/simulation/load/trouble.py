"""What goes wrong in a simulated run, because its author wants to see it: engines that die or are slow, and
messages that are lost or late.

    ENGINE@T          killed at second T after the first request
    ENGINE@T-BACK     and started again at second BACK
    ENGINE@T:FACTOR   so many times slower from second T on; ENGINE@T-BACK:FACTOR until BACK

Owns these words. The faults themselves are ``../faults``'.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from microserve.protocol.errors import ConfigError
from microserve.services.simulation.faults.fates import Fault
from microserve.services.simulation.faults.fault import Faults
from microserve.services.simulation.mesh import SimulatedMesh
from microserve.services.simulation.network import Weather

KILL, SLOW = "kill", "slow"
LATE_S = 0.3
"""A late message is late by so much at most."""
_NUMBER = r"(\d+(?:\.\d+)?)"
_WORDS = re.compile(rf"(?:engine-)?(\d+)@{_NUMBER}(?:-{_NUMBER})?(?::{_NUMBER})?")


@dataclass(frozen=True)
class Trouble:
    """Of one run. Times in seconds after the first request; ``until`` may be infinite."""

    faults: tuple[Fault, ...] = ()
    lost: float = 0.0
    """Share of all messages."""
    late: float = 0.0

    @property
    def is_any(self) -> bool:
        return bool(self.faults or self.lost or self.late)

    def lay(self, mesh: SimulatedMesh, seed: int, begin_s: float) -> None:
        """Make it happen, from ``begin_s`` on."""
        if not self.is_any:
            return
        makes = Faults(mesh, seed)
        mesh.network.weather = Weather(drop=self.lost, delay=self.late, max_delay_s=LATE_S)
        for fault in self.faults:
            mesh.loop.at(begin_s + fault.at, partial(makes.begin, fault))
            if math.isfinite(fault.until):
                mesh.loop.at(begin_s + fault.until, partial(makes.end, fault))


NO_TROUBLE = Trouble()


def trouble_of(
    kill: Sequence[str], slow: Sequence[str], lost: float, late: float, num_engines: int
) -> Trouble:
    """From flags. Raises :class:`ConfigError` that names the flag."""
    for name, share in (("lost", lost), ("late", late)):
        if not 0.0 <= share < 1.0:
            raise ConfigError(f"{name} is {share:g}, a share of all messages from 0 and below 1", field=name)
    faults = [_fault(KILL, text, num_engines) for text in kill]
    faults += [_fault(SLOW, text, num_engines) for text in slow]
    return Trouble(tuple(sorted(faults, key=lambda fault: fault.at)), lost, late)


def _fault(kind: str, text: str, num_engines: int) -> Fault:
    found = _WORDS.fullmatch(text)
    wanted = "ENGINE@SECOND[-SECOND]" + (":FACTOR" if kind == SLOW else "")
    if found is None or (found[4] is None) == (kind == SLOW):
        raise ConfigError(f"{kind} {text!r} is not {wanted}", field=kind)
    number, at, until = int(found[1]), float(found[2]), float(found[3] or math.inf)
    if number >= num_engines:
        raise ConfigError(f"{kind} {text!r}: there are engines 0 to {num_engines - 1}", field=kind)
    if until <= at:
        raise ConfigError(f"{kind} {text!r} is over before it begins", field=kind)
    factor = float(found[4] or 1.0)
    if factor < 1.0:
        raise ConfigError(f"{kind} {text!r}: a factor is 1 or more", field=kind)
    return Fault(at, until, kind, f"engine-{number}", number=factor)
