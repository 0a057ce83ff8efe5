"""What the services use while chaos runs, and what they wrote: memory, descriptors, CPU denied, errors."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from microserve.protocol import log
from tests.support.chaos.faults import Fault
from tests.support.chaos.mesh import ChaosMesh

INTERVAL_S = 1.0
YOUNG_S = 20.0
"""Imports, first batches and first connections: not yet a slope."""
MAX_FDS_GROWTH = 32
STARVED = 0.75
"""A main thread that waited for a CPU for this share of the time could not keep up its heartbeats."""
ERRORS = frozenset({log.SERVICE_FAILED, log.STEP_FAILED, log.BUS_HANDLER_FAILED, log.STRATEGY_FAILED})


@dataclass(frozen=True)
class Sample:
    at: float
    rss_nbytes: int
    num_fds: int


@dataclass
class Watch:
    """Samples by (service, pid): every life is a curve of its own."""

    mesh: ChaosMesh
    samples: dict[tuple[str, int], list[Sample]] = field(default_factory=lambda: defaultdict(list))
    starved: list[Fault] = field(default_factory=list)
    """What the machine did to us beside our own faults, measured by the kernel (schedstat)."""
    _waited: dict[int, tuple[float, float]] = field(default_factory=dict)
    """By pid: when it was looked at, and the seconds it had waited for a CPU until then."""

    def _look(self, name: str, pid: int) -> None:
        try:
            waited_s = int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
        except OSError:
            return
        now = time.monotonic()
        before, before_s = self._waited.get(pid, (now, waited_s))
        self._waited[pid] = now, waited_s
        if waited_s - before_s > STARVED * max(INTERVAL_S, now - before):
            self.starved.append(Fault("starved", (name,), before, now))

    async def run(self) -> None:
        while True:
            self._look("client", os.getpid())
            for name, service in self.mesh.services.items():
                try:
                    process = psutil.Process(service.process.pid)
                    sample = Sample(time.monotonic(), process.memory_info().rss, process.num_fds())
                except psutil.NoSuchProcess:
                    continue
                self.samples[name, service.process.pid].append(sample)
                self._look(name, service.process.pid)
            await asyncio.sleep(INTERVAL_S)

    def slopes(self) -> dict[str, tuple[float, float, float]]:
        """By service, of its longest life: MiB a minute (least squares), MiB at the end, minutes observed."""
        best: dict[str, list[Sample]] = {}
        for (name, _), samples in self.samples.items():
            grown = [sample for sample in samples if sample.at - samples[0].at >= YOUNG_S]
            if len(grown) >= 10 and len(grown) > len(best.get(name, [])):
                best[name] = grown
        return {
            name: (
                _slope([s.at / 60 for s in grown], [s.rss_nbytes / 2**20 for s in grown]),
                grown[-1].rss_nbytes / 2**20,
                (grown[-1].at - grown[0].at) / 60,
            )
            for name, grown in sorted(best.items())
        }

    def leaking_fds(self) -> list[str]:
        """Lives whose descriptors grew by more than reconnects explain."""
        found = []
        for (name, _), samples in self.samples.items():
            grown = [sample.num_fds for sample in samples if sample.at - samples[0].at >= YOUNG_S]
            if grown and grown[-1] - grown[0] > MAX_FDS_GROWTH:
                found.append(f"{name}: {grown[0]} descriptors, then {grown[-1]}")
        return found

    def max_fds(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for (name, _), samples in self.samples.items():
            found[name] = max(found.get(name, 0), *(sample.num_fds for sample in samples))
        return found


def _slope(xs: list[float], ys: list[float]) -> float:
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - mean_x) ** 2 for x in xs)
    return sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / spread


@dataclass
class Logs:
    """What all lives of all services wrote."""

    errors: list[str] = field(default_factory=list)
    continued: set[str] = field(default_factory=set)
    """Requests that a router continued on another engine."""
    events: dict[str, int] = field(default_factory=lambda: defaultdict(int))


def read_logs(mesh: ChaosMesh) -> Logs:
    found = Logs()
    for service in mesh.history:
        for line in service.log.read_text(errors="replace").splitlines():
            try:
                event = json.loads(line)
            except ValueError:
                # A line cut short by SIGKILL is the last one and begins like the others.
                if line and not line.startswith("{"):
                    found.errors.append(f"{service.log.name}: {line}")
                continue
            name = event["event"]
            found.events[name] += 1
            if name == log.REQUEST_CONTINUED:
                found.continued.add(event["request_id"])
            if name in ERRORS or event["level"] in ("error", "critical"):
                found.errors.append(f"{service.log.name}: {line[:500]}")
    return found
