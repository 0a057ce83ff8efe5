"""One strategy served in a small simulated mesh before it is published: what goes wrong, as mistakes.

Owns what a strategy meets and what counts as a mistake. It comes to the simulated routers, of which there are
two, the way it comes to real ones: by the index. It meets, one after the other,

    short prompts   close together, with shared prefixes; who asks differs, and some do not wait
    long prompts    of one to eight thousand tokens
    a slow engine   ten times slower than the others
    a full engine   that has no block to give
    late messages   a third of them, by up to 0.2 s
    a lost engine   killed with requests on it, and back a second later
    one engine      a mesh of its own

None of that costs a client its answer, so whatever goes wrong is the strategy's doing. What neither ends nor
awaits must be ended from outside.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

from microserve.protocol.errors import ConfigError, InternalError, MeshError, NoEngines, QueueFull
from microserve.protocol.messages.strategy.control import Scalar
from microserve.protocol.strategy_source import unpacked
from microserve.services.router.oversight.overseer import Overseer
from microserve.services.router.rollout.window import MIN_ERRORS
from microserve.services.simulation.faults.campaign import NOTICE_S, REST_S
from microserve.services.simulation.faults.judge import judge_answer, judge_rest
from microserve.services.simulation.journal import Journal, plainly
from microserve.services.simulation.loop import VirtualLoop
from microserve.services.simulation.mesh import until
from microserve.services.simulation.network import Weather
from microserve.services.simulation.trial.blame import Told, blame, file_of
from microserve.services.simulation.trial.growth import held_by, num_entries, told_growth
from microserve.services.simulation.trial.mistake import Found
from microserve.services.simulation.trial.world import (
    GAP_S,
    JOIN_S,
    LOOK_S,
    Labels,
    TrialWorld,
    attributes_in,
    make_world,
)

NUM_REQUESTS = 12
NUM_TROUBLED = 6
"""Requests while an engine is slow, full or lost, and while messages are late."""
NUM_ALONE = 4
LONG = (1024, 2048, 4096, 8192)
"""Tokens of the long prompts."""
SLOWNESS = 10.0
FULL_S = 0.6
LATE = Weather(delay=0.3, max_delay_s=0.2)
LOST_AFTER_S, LOST_S = 0.4, 1.0
PATIENCE_S = 60.0
"""For the requests of one of these, virtual seconds."""
MAX_FOUND = 8

_Phase = Callable[[TrialWorld], Awaitable[None]]


@dataclass(frozen=True)
class Trial:
    found: list[Found]
    request_s: float
    """Mean time of a request with a short prompt, virtual seconds."""
    notes: list[str] = field(default_factory=list)
    """Worth knowing, and no mistake."""


@dataclass
class _Course:
    """What has come of it so far."""

    told: list[Told] = field(default_factory=list)
    found: list[Found] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    times_s: list[float] = field(default_factory=list)


def try_strategy(
    name: str,
    source: str,
    parameters: Mapping[str, Scalar],
    labels: Labels,
    overseer: Overseer | None = None,
    *,
    only_short: bool = False,
) -> Trial:
    """Serve some requests with it; with ``source`` empty, by the ``name`` that routers come with.

    With an overseer its decisions have a budget of real time too. ``only_short``: without what is hard.
    """
    sources = unpacked(source)
    course = _Course()
    phases = (_short,) if only_short else (_short, _long, _slow, _full, _late, _lost)
    _run(course, name, source, parameters, labels, overseer, phases)
    if not (only_short or course.told or course.found or len(labels) < 2):
        _run(course, name, source, parameters, [[]], overseer, (_alone,))
    found = course.found + [blame(each, sources, file_of) for each in course.told]
    unique = [*{(each.mistake, each.file, each.line): each for each in reversed(found)}.values()][::-1]
    placed = [each for each in unique if each.line] or unique  # what comes of them has no place of its own
    notes = [f"{count} requests were refused: {why}" for why, count in course.refused.items()]
    times = course.times_s
    return Trial(placed[:MAX_FOUND], sum(times) / len(times) if times else 0.0, notes)


def _run(
    course: _Course,
    name: str,
    source: str,
    parameters: Mapping[str, Scalar],
    labels: Labels,
    overseer: Overseer | None,
    phases: Sequence[_Phase],
) -> None:
    """One mesh from its start to its rest."""
    loop = VirtualLoop()
    journal = Journal(loop, keep=False)
    journal.open()
    try:
        world = make_world(
            *(loop, journal, name, labels, attributes_in(unpacked(source)), overseer),
            num_routers=1 if len(labels) < 2 else 2,
        )
        loop.run(_serve(world, course, source, parameters, phases))
    except InternalError as error:  # nobody waits for anything any more, or somebody spins
        course.told += [Told(text, place) for text, place in journal.mistakes]
        course.told.append(Told(error.detail))
    except MeshError as error:
        course.told.append(Told(error.detail))
    finally:
        journal.close()
    course.told += [Told(failure) for failure in loop.failures]
    if len(journal.slow) >= MIN_ERRORS:  # one or two may be the machine's doing
        [(place, _)] = Counter(journal.slow).most_common(1)
        num_slow, num_all = len(journal.slow), len(world.answers)
        told = f"it held the router for too long at a time, in {num_slow} of {num_all} requests"
        course.told.append(Told(told, place))


async def _serve(
    world: TrialWorld,
    course: _Course,
    source: str,
    parameters: Mapping[str, Scalar],
    phases: Sequence[_Phase],
) -> None:
    mesh, journal, sources = world.mesh, world.mesh.journal, unpacked(source)
    try:
        await world.begin()
        if source and (faults := await world.publish(source, parameters)):
            raise ConfigError(faults[0])
        held = 0
        for phase in phases:
            said = phase.__doc__ or ""
            before, num_mistakes, num_defects = (
                len(world.answers),
                len(journal.mistakes),
                len(journal.defects),
            )
            await phase(world)
            await world.wait(PATIENCE_S)
            told = [Told(text, place, said) for text, place in journal.mistakes[num_mistakes:]]
            if not told:
                told = _judge(world, before, course.refused, said)
                told += [Told(plainly(line), "", said) for line in journal.defects[num_defects:]]
            course.told += told
            if phase is _short:
                course.times_s += [a.ended_at - a.submitted_at for a in world.answers if a.is_complete]
                held = _num_held(world) if source else 0
            if told:  # what comes after it would be the same again
                break
        if source and not course.told and phases[0] is _short:
            num_more, num_between = _num_held(world) - held, len(world.answers) - NUM_REQUESTS
            course.found += told_growth(num_more, num_between, sources)
        await asyncio.sleep(NOTICE_S)
        await until(lambda: not judge_rest(mesh, with_indexes=False), REST_S)
        course.told += [Told(each) for each in judge_rest(mesh, with_indexes=False) if not course.told]
    finally:
        mesh.close()


def _num_held(world: TrialWorld) -> int:
    """Entries that the strategy keeps, in all routers together."""
    roots: list[object] = []
    for router in world.routers():
        strategy = router.strategies.get(world.strategy)
        roots += [router.serving.plans.use(strategy), *held_by(strategy.function.__globals__)]
    return num_entries(roots)


def _judge(world: TrialWorld, begin: int, refused: Counter[str], said: str) -> list[Told]:
    told: list[Told] = []
    for answer in world.answers[begin:]:
        is_alone = said in (_lost.__doc__, _alone.__doc__)  # nobody may be left who bears a label
        if answer.outcome == QueueFull.code or (answer.outcome == NoEngines.code and is_alone):
            refused[f"{answer.detail}{f', {said}' if said else ''}"] += 1
        elif not (answer.is_complete or answer.is_cancelled):
            outcome = answer.outcome or "it has not ended"
            told.append(Told(f"a request was not served: {outcome} {answer.detail}".rstrip(), "", said))
        told += [Told(each, "", said) for each in judge_answer(answer)]
    return told


# --- what it meets: the docstring is what mistakes are told with ----------------------------------------


async def _short(world: TrialWorld) -> None:
    """"""
    await world.come(NUM_REQUESTS, leaving=True)


async def _long(world: TrialWorld) -> None:
    """with prompts of up to 8192 tokens"""
    for num_tokens in LONG:
        world.submit_long(num_tokens)
        await asyncio.sleep(GAP_S)


async def _slow(world: TrialWorld) -> None:
    """while an engine was ten times slower than the others"""
    pacer = world.mesh.seats[world.mesh.engines[-1]].service.pacer
    pacer.slowness = SLOWNESS
    await world.come(NUM_TROUBLED)
    await world.wait(PATIENCE_S)
    pacer.slowness = 1.0


async def _full(world: TrialWorld) -> None:
    """while an engine was full"""
    pool = world.mesh.seats[world.mesh.engines[0]].service.core.memory.pool
    taken = pool.allocate(pool.num_free)
    world.call_soon(FULL_S, lambda: pool.free(taken))
    await world.come(NUM_TROUBLED)


async def _late(world: TrialWorld) -> None:
    """while messages came late"""
    network = world.mesh.network
    network.weather = LATE
    await world.come(NUM_TROUBLED, leaving=True)
    await world.wait(PATIENCE_S)
    network.weather = Weather()


async def _lost(world: TrialWorld) -> None:
    """while an engine was lost"""
    mesh = world.mesh
    if len(mesh.engines) < 2:
        return  # nobody could serve
    lost = mesh.engines[-1]
    world.call_soon(LOST_AFTER_S, lambda: mesh.kill(lost))
    world.call_soon(LOST_AFTER_S + LOST_S, lambda: mesh.start(lost))
    await world.come(NUM_TROUBLED)
    await world.wait(PATIENCE_S)
    await until(world.is_together, JOIN_S, LOOK_S)


async def _alone(world: TrialWorld) -> None:
    """in a mesh of one engine"""
    await world.come(NUM_ALONE)
