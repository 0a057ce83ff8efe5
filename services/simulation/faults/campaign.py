"""Seeds by the thousand: run each mesh, judge it, add up.

    python -m microserve.services.simulation.faults.campaign --seeds 1000

Exit code 0: every promise held. A seed that broke one is printed with the command that replays it.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import multiprocessing
import sys
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cache

import msgspec

from microserve.protocol import log
from microserve.protocol.errors import QueueFull
from microserve.services.simulation.faults.fault import Faults
from microserve.services.simulation.faults.judge import (
    GONE_S,
    judge_answer,
    judge_codes,
    judge_gone,
    judge_outcomes,
    judge_promises,
    judge_rest,
    judge_service,
)
from microserve.services.simulation.faults.meeting import SITUATIONS, situations
from microserve.services.simulation.faults.scenario import CALM, RARE, STRATEGIES, Arrival, Scenario, draw
from microserve.services.simulation.gateway import Answer
from microserve.services.simulation.journal import Journal
from microserve.services.simulation.loop import VirtualLoop
from microserve.services.simulation.mesh import SimulatedMesh, until

OUTCOME_S = 5.0
"""After the last fault every request has an outcome within this time."""
REST_S = 15.0
"""And nothing is left over within this time."""
NOTICE_S = 0.5
"""A message that was lost last of all shows with the next one, two heartbeats later at most."""
PROBE_S = 3.0
MAX_PRINTED = 20
"""Seeds with broken promises that are told in full."""
CHECK_S = 0.1
"""Between two looks at every engine's blocks while faults happen."""
PROBED = (*STRATEGIES, *RARE)
PROBES_A_ROUTER = 2
PROBE_TOKENS = 4
AGAIN_S = 1.0
PROBE_LOOK_S = 0.02
CROWD = 4
"""Requests that come, one behind the other, where an ambush calls for them."""
CROWD_GAP_S = 0.006
"""Time for an engine to begin what the ambush has made possible."""


@dataclass
class Verdict:
    """What one seed, or many, came to."""

    seed: int
    violations: list[str] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    events: Counter[str] = field(default_factory=Counter)
    met: Counter[str] = field(default_factory=Counter)
    """How often each situation (meeting.py) came; over many seeds, in how many of them."""
    digest: str = ""
    lines: list[str] = field(default_factory=list)
    virtual_s: float = 0.0


def run_seed(seed: int, *, keep: bool = False, scenario: Scenario | None = None) -> Verdict:
    """One mesh from its start to its verdict; the same for the same seed, byte for byte."""
    loop = VirtualLoop()
    journal = Journal(loop, keep=keep)
    verdict = Verdict(seed)
    journal.open()
    try:
        loop.run(_run(loop, journal, scenario or draw(seed), verdict))
    except Exception as error:
        verdict.violations.append(f"the mesh broke: {type(error).__name__}: {error}")
    finally:
        journal.close()
    verdict.violations += [f"defect: {line}" for line in journal.defects]
    verdict.violations += [f"uncaught: {failure}" for failure in loop.failures]
    verdict.events = journal.events
    verdict.digest, verdict.lines, verdict.virtual_s = journal.digest, journal.lines, loop.now
    return verdict


async def _run(loop: VirtualLoop, journal: Journal, scenario: Scenario, verdict: Verdict) -> None:
    mesh = SimulatedMesh(loop, scenario.seed, scenario.shape, journal)
    faults = Faults(mesh, scenario.seed)
    answers: list[Answer] = []
    crowd = iter(scenario.crowd)

    def let_some_come() -> None:
        for number, arrival in enumerate(itertools.islice(crowd, CROWD), start=1):
            at = loop.now + number * CROWD_GAP_S
            loop.at(at, _submit, mesh, replace(arrival, at=at), answers)

    faults.ambushes.crowd = let_some_come
    try:
        mesh.start_all()
        for arrival in scenario.arrivals:
            loop.at(arrival.at, _submit, mesh, arrival, answers)
            if arrival.cancel_after_s is not None and scenario.kind == CALM:
                at = arrival.at + arrival.cancel_after_s + GONE_S
                loop.at(at, _look_for, mesh, arrival, answers, verdict)
        for fault in scenario.faults:
            loop.at(fault.at, faults.begin, fault)
            loop.at(fault.until, faults.end, fault)
        while loop.now <= scenario.ends_at:
            await asyncio.sleep(CHECK_S)
            verdict.violations += mesh.check_integrity()
        faults.mend()
        verdict.faults = faults.total()
        await until(lambda: all(answer.outcome for answer in answers), OUTCOME_S)
        verdict.violations += judge_outcomes(answers) + judge_codes(answers)
        num_continued = journal.events[log.REQUEST_CONTINUED]
        verdict.violations += judge_service(scenario, answers, num_continued, journal.held_up)
        verdict.violations += await _settle(mesh)
        verdict.violations += await _probe(mesh, answers)
        for answer in answers:
            verdict.violations += judge_answer(answer, is_marked=bool(scenario.shape.numerics))
            verdict.outcomes[answer.outcome or "none"] += 1
        verdict.violations += judge_promises(mesh, answers)
        for gateway in mesh.all_gateways():
            verdict.violations += gateway.violations()
        verdict.violations += mesh.witness.finish()
    finally:
        mesh.close()
        verdict.met = situations(mesh, journal, answers)


def _submit(mesh: SimulatedMesh, arrival: Arrival, answers: list[Answer]) -> None:
    seat = mesh.seats[arrival.gateway]
    if not seat.is_alive:
        return
    answer = Answer(
        f"{arrival.gateway}.{seat.num_lives}.{len(answers)}", list(arrival.prompt), arrival.params, arrival.at
    )
    answer.strategy, answer.salt = arrival.strategy, arrival.salt
    answer.attributes, answer.priority = {"user": f"user-{len(arrival.prompt) % 5}"}, len(arrival.prompt) % 3
    answers.append(answer)
    gateway = seat.service
    gateway.submit(answer, mesh.address(arrival.router), ttl_s=30.0)
    if arrival.cancel_after_s is not None:
        mesh.loop.at(mesh.loop.now + arrival.cancel_after_s, gateway.cancel, answer)


def _look_for(mesh: SimulatedMesh, arrival: Arrival, answers: list[Answer], verdict: Verdict) -> None:
    for answer in answers:
        if answer.submitted_at == arrival.at:
            verdict.violations += judge_gone(mesh, answer.request_id)


async def _settle(mesh: SimulatedMesh) -> list[str]:
    """Violations that are still there when the time is over."""
    left: list[str] = []

    def is_clean() -> bool:
        left[:] = judge_rest(mesh)
        return not left

    await asyncio.sleep(NOTICE_S)
    await until(is_clean, REST_S)
    is_clean()
    return left


@cache
def _template(number: int) -> Arrival:
    return draw(number).arrivals[0]


async def _probe(mesh: SimulatedMesh, answers: list[Answer]) -> list[str]:
    """The mesh serves again: every router is asked, the strategies in turn, and each answer must be whole."""
    probes = []
    for place, router in enumerate(mesh.routers):
        for offset in range(PROBES_A_ROUTER):
            number = (mesh.seed * PROBES_A_ROUTER + place + offset) % len(PROBED)
            strategy, template = PROBED[number], _template(number)
            probe = replace(
                template,
                params=msgspec.structs.replace(template.params, max_tokens=PROBE_TOKENS),
                gateway=mesh.gateways[0],
                router=router,
                strategy=strategy,
                salt="",
                cancel_after_s=None,
            )
            _submit(mesh, probe, answers)
            # One after the other: a full queue would be a good answer.
            await until(lambda: bool(answers[-1].outcome), PROBE_S, PROBE_LOOK_S)
            if answers[-1].outcome == QueueFull.code:
                # What was measured in a fault may still predict too long a wait; a client comes again later.
                await asyncio.sleep(AGAIN_S)
                _submit(mesh, probe, answers)
                await until(lambda: bool(answers[-1].outcome), PROBE_S, PROBE_LOOK_S)
            probes.append(answers[-1])
    await until(lambda: all(probe.outcome for probe in probes), PROBE_S)
    return [
        f"not well: {probe.strategy} ended {probe.outcome!r} ({probe.detail}) after all faults were over"
        for probe in probes
        if not probe.is_complete
    ]


# --- many seeds ------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--seeds", type=int, default=1000, help="how many")
    parser.add_argument("--seconds", type=float, default=0.0, help="stop after so much wall time (0: never)")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--replay", type=int, help="run this seed alone and print its journal")
    options = parser.parse_args(arguments)
    if options.replay is not None:
        verdict = run_seed(options.replay, keep=True)
        print("\n".join(verdict.lines))
        print(f"\nseed {verdict.seed}: digest {verdict.digest}", *verdict.violations, sep="\n  ")
        return 1 if verdict.violations else 0
    return _run_many(options.first, options.seeds, options.seconds, options.jobs)


def _run_many(first: int, num_seeds: int, seconds: float, jobs: int) -> int:
    started = time.monotonic()
    total, broken, done = Verdict(first), [], 0
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        for verdict in pool.imap_unordered(run_seed, range(first, first + num_seeds), chunksize=8):
            done += 1
            total.faults += verdict.faults
            total.outcomes += verdict.outcomes
            total.events += verdict.events
            total.met.update(verdict.met.keys())
            total.virtual_s += verdict.virtual_s
            if verdict.violations:
                broken.append(verdict)
                if len(broken) > MAX_PRINTED:
                    continue
                print(f"seed {verdict.seed}:", *verdict.violations[:4], sep="\n  ", flush=True)
            if seconds and time.monotonic() - started > seconds:
                break
    wall_s = time.monotonic() - started
    num_faults = total.faults.total()
    print(f"\n{done} seeds, {num_faults} faults, {total.virtual_s:.0f} s of virtual time in {wall_s:.0f} s")
    print(f"{num_faults / wall_s:.0f} faults/s, {done / wall_s:.1f} seeds/s, {jobs} jobs")
    for title, counts in (("faults", total.faults), ("outcomes", total.outcomes)):
        print(f"{title}: " + ", ".join(f"{name} {count}" for name, count in counts.most_common()))
    print(f"met, in how many of {done} worlds:")
    for name in sorted(SITUATIONS, key=lambda each: -total.met[each]):
        print(f"{total.met[name]:>8}  {name}")
    print(f"seeds with a broken promise: {len(broken)}")
    if broken:
        print(f"replay: python -m microserve.services.simulation.faults.campaign --replay {broken[0].seed}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
