"""One chaos run from start to verdict: the mesh, the oracle, load and faults together, the checks at the end.

python tests/chaos/chaos.py --seconds 60 --seed 1 [--rate 4] [--faults 0.5] [--hosts]
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from microserve.protocol.settings.settings import BusSettings
from tests.support.chaos.cases import Question, ask_oracle, keep_stable, make_pool
from tests.support.chaos.client import Attempt, open_doors
from tests.support.chaos.faults import BETWEEN_HOSTS, WEIGHTS, Fault, Faults, plan_faults
from tests.support.chaos.hosts import HOSTS, host_chaos_mesh
from tests.support.chaos.judge import Judge, Verdict
from tests.support.chaos.load import Load, Outcome, plan_load
from tests.support.chaos.mesh import ChaosMesh, chaos_mesh
from tests.support.chaos.watch import Logs, Watch, read_logs
from tests.support.hosts.world import World

POOL = 60
"""Questions made; those with a near-tie are left out."""
MIN_QUESTIONS = 15


@dataclass(frozen=True)
class Chaos:
    """What to do. Rates are a second."""

    model: Path
    seconds: float
    seed: int
    rate: float = 4.0
    fault_rate: float = 0.5
    max_prompt: int = 400
    max_output: int = 300
    hosts: bool = False
    """Each engine on a host of its own, and faults of hosts and links too. Needs root."""
    bus: BusSettings = field(default_factory=lambda: BusSettings(liveness=12))
    """More patient than usual: everything shares a few cores with what is being restarted."""


@dataclass
class Report:
    chaos: Chaos
    num_questions: int
    verdict: Verdict
    faults: list[Fault]
    skipped: int
    watch: Watch
    logs: Logs
    problems: list[str] = field(default_factory=list)
    """Every promise that was not kept; empty is what a run must be."""

    def table(self) -> str:
        counts, chaos = self.verdict.counts, self.chaos
        order = ["requests", "completed", "retried", "failed, explained", "cancelled"]
        order += ["wrong", "stuck", "unexplained"]
        kinds = Counter(fault.name if fault.kind != "cut" else "cut" for fault in self.faults)
        lines = [
            f"chaos: seed {chaos.seed}, {chaos.seconds:g} s, {chaos.rate:g} requests/s, "
            f"{chaos.fault_rate:g} faults/s, model {chaos.model.name}, {self.num_questions} questions",
            *(f"  {name:20} {counts[name]}" for name in order),
            f"  {'continued':20} {len(self.logs.continued)}",
            f"  {'faults':20} {len(self.faults)} ({self.skipped} skipped)",
            *(f"    {name:18} {count}" for name, count in sorted(kinds.items())),
            f"  {'starved of CPU':20} {len(self.watch.starved)} process-seconds",
            "  recovery, s      of   median    p95  worst   amid other faults: of  worst",
        ]
        for name, waits in sorted(self.verdict.recovery_s.items()):
            alone, amid = ([wait for wait, is_alone in waits if is_alone is which] for which in (True, False))
            lines.append(f"    {name:14} {_spread(alone)}                     {len(amid):4} {_worst(amid)}")
        lines.append("  RSS                  MiB/min    MiB  minutes  most descriptors")
        fds = self.watch.max_fds()
        for name, (slope, end, minutes) in self.watch.slopes().items():
            lines.append(f"    {name:18} {slope:7.2f} {end:6.0f} {minutes:7.1f} {fds[name]:7}")
        lines += [f"  BROKEN {problem}" for problem in self.problems]
        lines.append("every promise was kept" if not self.problems else f"{len(self.problems)} BROKEN")
        return "\n".join(lines)


def run_chaos(chaos: Chaos, directory: Path, out: Path | None = None) -> Report:
    """Start, disturb, stop and judge. Call in the main thread: services are tied to it (leash.py)."""
    before = _in_shared_memory()
    with ExitStack() as stack:
        if chaos.hosts:
            world = stack.enter_context(World(directory, HOSTS))
            mesh: ChaosMesh = host_chaos_mesh(chaos.model, directory, chaos.bus, world)
            stack.enter_context(mesh)
            stack.enter_context(world.front.inside.joined())
        else:
            mesh = stack.enter_context(chaos_mesh(chaos.model, directory, chaos.bus))
        questions, load, faults, watch, left = asyncio.run(_disturb(chaos, mesh))
    logs = read_logs(mesh)
    judge = Judge(
        questions,
        faults.done + watch.starved,
        [f"engine-{number}" for number in range(mesh.num_engines)],
        silence_s=chaos.bus.heartbeat_interval_s * chaos.bus.liveness,
    )
    verdict = judge.judge(load.outcomes, logs.continued)
    report = Report(chaos, len(questions), verdict, faults.done, faults.skipped, watch, logs)
    report.problems += verdict.problems + faults.broken + left + watch.leaking_fds() + logs.errors
    report.problems += [
        f"{service.name}: process {service.process.pid} was left"
        for service in mesh.history
        if service.process.poll() is None
    ]
    report.problems += [f"left in /dev/shm: {name}" for name in _in_shared_memory() - before]
    if out is not None:
        _write(out, report, load.outcomes)
    return report


async def _disturb(chaos: Chaos, mesh: ChaosMesh) -> tuple[list[Question], Load, Faults, Watch, list[str]]:
    config = json.loads((chaos.model / "config.json").read_text())
    cases = make_pool(
        POOL,
        vocab_size=config["vocab_size"],
        max_prompt=chaos.max_prompt,
        max_output=chaos.max_output,
        seed=chaos.seed,
    )
    with mesh.buses() as (bus, engines_bus):
        questions = await ask_oracle(engines_bus, mesh.services["engine-0"].address, cases, chaos.model)
        questions = keep_stable(questions, chaos.model)
        if len(questions) < MIN_QUESTIONS:
            raise RuntimeError(f"only {len(questions)} of {POOL} questions have no near-tie")
        faults, watch = Faults(mesh), Watch(mesh)
        async with open_doors(bus, mesh, chaos.bus) as doors:
            routers = list(mesh.router_addresses)
            load = Load(doors, questions, routers)
            await doors.wait_engines(mesh.num_engines)
            await _until_ready(mesh)
            watching = asyncio.create_task(watch.run())
            # Faults end a little before the load does, so that some of it sees the mesh come back.
            weights = BETWEEN_HOSTS if chaos.hosts else WEIGHTS
            fault_plan = plan_faults(chaos.seconds, chaos.fault_rate, chaos.seed, weights)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(
                    load.run(plan_load(chaos.seconds, chaos.rate, chaos.seed, len(questions), routers))
                )
                tasks.create_task(faults.run(fault_plan))
            left = []
            for name in mesh.alive("engine"):
                missing = await mesh.wait_whole(engines_bus, name)
                if missing:
                    left.append(f"leaked: {name} still has {missing}")
            watching.cancel()
        return questions, load, faults, watch, left


async def _until_ready(mesh: ChaosMesh) -> None:
    url = f"{mesh.gateway_url}/ready"
    async with asyncio.timeout(60), httpx.AsyncClient() as http:
        while (await http.get(url)).status_code != httpx.codes.OK:
            await asyncio.sleep(0.05)


def _in_shared_memory() -> set[str]:
    """Ours; other programs come and go there."""
    return {name for name in os.listdir("/dev/shm") if "microserve" in name}


def _spread(waits: list[float]) -> str:
    if not waits:
        return "   0        -      -      -"
    p95 = sorted(waits)[min(len(waits) - 1, int(0.95 * len(waits)))]
    return f"{len(waits):4}   {statistics.median(waits):6.2f} {p95:6.2f} {_worst(waits)}"


def _worst(waits: list[float]) -> str:
    return f"{max(waits):6.2f}" if waits else "     -"


def _write(out: Path, report: Report, outcomes: list[Outcome]) -> None:
    """JSON lines for a debugger: faults, requests with all their attempts, memory, what was broken."""
    origin = min([fault.at for fault in report.faults] + [outcome.started_at for outcome in outcomes])
    with out.open("w") as sink:
        for fault in report.faults:
            sink.write(json.dumps(fault.line(origin)) + "\n")
        for outcome in outcomes:
            line = {
                "request": outcome.plan.number,
                "strategy": outcome.plan.strategy,
                "cancelled": outcome.cancelled,
                "attempts": [_attempt(attempt, origin) for attempt in outcome.attempts],
            }
            sink.write(json.dumps(line) + "\n")
        for (name, pid), samples in report.watch.samples.items():
            curve = [[round(s.at - origin), s.rss_nbytes >> 10, s.num_fds] for s in samples]
            sink.write(json.dumps({"service": name, "pid": pid, "s, KiB, descriptors": curve}) + "\n")
        for problem in report.problems:
            sink.write(json.dumps({"broken": problem}) + "\n")


def _attempt(attempt: Attempt, origin: float) -> dict[str, Any]:
    return {
        "id": attempt.request_id,
        "door": attempt.door,
        "from": round(attempt.started_at - origin, 3),
        "to": round(attempt.ended_at - origin, 3),
        "reason": attempt.reason,
        "code": attempt.code,
        "detail": attempt.detail,
        "engines": attempt.engines,
        "tokens": attempt.num_tokens,
        "violations": attempt.violations,
    }
