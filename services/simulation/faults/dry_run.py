"""One strategy served in a small simulated mesh before it is published: what would go wrong, in words.

Owns the requests of a dry run and what counts as a problem. The strategy comes to the simulated routers the
way it comes to real ones, through the index. It meets, one after the other,

    short prompts   close together, with shared prefixes
    long prompts    of one to eight thousand tokens
    a slow engine   ten times slower than the others
    a lost engine   killed with requests on it, and back a second later

None of that costs a client its answer, so whatever goes wrong is the strategy's doing. What neither ends nor
awaits must be ended from outside.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass

from microserve.protocol import log
from microserve.protocol.errors import InternalError, MeshError
from microserve.protocol.messages.control import PUBLISH, Change, Changed, Scalar
from microserve.protocol.messages.sampling import SamplingParams
from microserve.services.index.service import IndexService
from microserve.services.router.oversight.overseer import Overseer
from microserve.services.router.rollout.window import MIN_ERRORS
from microserve.services.router.service import Router
from microserve.services.simulation.engine import VOCAB_SIZE
from microserve.services.simulation.faults.campaign import NOTICE_S, REST_S
from microserve.services.simulation.faults.judge import judge_answer, judge_rest
from microserve.services.simulation.faults.scenario import draw
from microserve.services.simulation.gateway import Answer
from microserve.services.simulation.journal import Journal, plainly
from microserve.services.simulation.loop import VirtualLoop
from microserve.services.simulation.mesh import INDEX, Shape, SimulatedMesh, until

NUM_REQUESTS = 12
MAX_ENGINES = 8
"""A larger mesh is tried with so many."""
GAP_S = 0.15
"""Between two requests: the later ones meet the earlier ones."""
TTL_S = 20.0
LOOK_S = 0.05
JOIN_S = 10.0
MAX_PROBLEMS = 8
LONG = (1024, 2048, 4096, 8192)
"""Tokens of the long prompts."""
NUM_TROUBLED = 6
"""Requests while an engine is slow, and while one is lost."""
SLOWNESS = 10.0
LOST_AFTER_S, LOST_S = 0.4, 1.0
PATIENCE_S = 60.0
"""For the requests of one of these, virtual seconds."""

Labels = Sequence[Sequence[str]]
"""Of each engine."""


@dataclass(frozen=True)
class Trial:
    problems: list[str]
    request_s: float
    """Mean time of a request with a short prompt, virtual seconds."""


def try_strategy(
    name: str,
    source: str,
    parameters: dict[str, Scalar],
    labels: Labels,
    overseer: Overseer | None = None,
    *,
    only_short: bool = False,
) -> Trial:
    """Serve a few requests with it; with ``source`` empty, by the ``name`` that routers come with.

    With an overseer its decisions have a budget of real time too. ``only_short``: without what is hard.
    """
    loop = VirtualLoop()
    journal = Journal(loop, keep=False)
    journal.open()
    answers: list[Answer] = []
    problems: list[str] = []
    try:
        mesh = _mesh(loop, journal, labels, overseer)
        problems += loop.run(_run(mesh, answers, name, source, parameters, only_short))
    except MeshError as error:
        problems.append(error.detail)
    finally:
        journal.close()
    problems += loop.failures
    if (num_slow := journal.events[log.STRATEGY_SLOW]) >= MIN_ERRORS:  # one or two may be the machine's doing
        problems.append(
            f"it held the router for too long at a time, in {num_slow} of {len(answers)} requests"
        )
    times = [a.ended_at - a.submitted_at for a in answers[:NUM_REQUESTS] if a.outcome]
    unique = list(dict.fromkeys(problems))[:MAX_PROBLEMS]
    return Trial(unique, sum(times) / len(times) if times else 0.0)


def _mesh(loop: VirtualLoop, journal: Journal, labels: Labels, overseer: Overseer | None) -> SimulatedMesh:
    labels = labels[:MAX_ENGINES] or [[]]
    shape = Shape(
        num_engines=len(labels),
        num_blocks=6144,
        max_num_batched_tokens=256,
        max_model_len=9000,
        labels=tuple(tuple(each) for each in labels),
        max_skew_s=0.0,
    )
    return SimulatedMesh(loop, 1, shape, journal, overseer)


async def _run(
    mesh: SimulatedMesh,
    answers: list[Answer],
    name: str,
    source: str,
    parameters: dict[str, Scalar],
    only_short: bool,
) -> list[str]:
    """All problems, each with what it happened at."""
    try:
        return await _serve(mesh, answers, name, source, parameters, only_short)
    finally:
        mesh.close()


async def _serve(
    mesh: SimulatedMesh,
    answers: list[Answer],
    name: str,
    source: str,
    parameters: dict[str, Scalar],
    only_short: bool,
) -> list[str]:
    mesh.start_all()
    await until(lambda: _is_together(mesh), JOIN_S, LOOK_S)
    if source:
        problems = await _publish(mesh, name, source, parameters)
        if problems:
            return problems
    problems = []
    for phase in (_short,) if only_short else (_short, _long, _slow, _lost):
        told = phase.__doc__ or ""
        before, num_defects = len(answers), len(mesh.journal.defects)
        await phase(mesh, name, answers)
        await until(lambda: all(answer.outcome for answer in answers), PATIENCE_S, LOOK_S)
        found = _judge(answers[before:])
        found += [plainly(line) for line in mesh.journal.defects[num_defects:]]
        problems += [f"{told}: {each}" if told else each for each in found]
        if problems:  # what comes after it would be the same again
            break
    await asyncio.sleep(NOTICE_S)
    await until(lambda: not judge_rest(mesh, with_indexes=False), REST_S)
    return problems + judge_rest(mesh, with_indexes=False)


# --- what it meets: the docstring is what problems are told with ---------------------------------------


async def _short(mesh: SimulatedMesh, name: str, answers: list[Answer]) -> None:
    """"""
    await _submit_some(mesh, name, answers, NUM_REQUESTS)


async def _long(mesh: SimulatedMesh, name: str, answers: list[Answer]) -> None:
    """with prompts of up to 8192 tokens"""
    rng = random.Random("long prompts")
    for num_tokens in LONG:
        prompt = [rng.randrange(VOCAB_SIZE) for _ in range(num_tokens)]
        _submit(mesh, name, answers, prompt, SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True))
        await asyncio.sleep(GAP_S)


async def _slow(mesh: SimulatedMesh, name: str, answers: list[Answer]) -> None:
    """while an engine was ten times slower than the others"""
    pacer = mesh.seats[mesh.engines[-1]].service.pacer
    pacer.slowness = SLOWNESS
    await _submit_some(mesh, name, answers, NUM_TROUBLED)
    await until(lambda: all(answer.outcome for answer in answers), PATIENCE_S, LOOK_S)
    pacer.slowness = 1.0


async def _lost(mesh: SimulatedMesh, name: str, answers: list[Answer]) -> None:
    """while an engine was lost"""
    if len(mesh.engines) < 2:
        return  # nobody could serve
    lost = mesh.engines[-1]
    mesh.loop.at(mesh.loop.now + LOST_AFTER_S, mesh.kill, lost)
    mesh.loop.at(mesh.loop.now + LOST_AFTER_S + LOST_S, mesh.start, lost)
    await _submit_some(mesh, name, answers, NUM_TROUBLED)
    await until(lambda: all(answer.outcome for answer in answers), PATIENCE_S, LOOK_S)
    await until(lambda: _is_together(mesh), JOIN_S, LOOK_S)


async def _submit_some(mesh: SimulatedMesh, name: str, answers: list[Answer], count: int) -> None:
    """Prompts, lengths and sampling as the campaign draws them."""
    for _ in range(count):
        template = draw(len(answers)).arrivals[0]
        _submit(mesh, name, answers, template.prompt, template.params)
        await asyncio.sleep(GAP_S)


def _is_together(mesh: SimulatedMesh) -> bool:
    router: Router | None = mesh.seats["router-0"].service
    gateway = mesh.seats["gateway-0"].service
    if router is None or gateway is None or gateway.num_usable == 0:
        return False
    return len(router.registry.usable()) == len(mesh.engines)


async def _publish(mesh: SimulatedMesh, name: str, source: str, parameters: dict[str, Scalar]) -> list[str]:
    index: IndexService = mesh.seats[INDEX].service
    router: Router = mesh.seats["router-0"].service
    reply = index.control.answer(Change(1, "dry run", PUBLISH, name, source, parameters), "")
    if not isinstance(reply, Changed):
        raise InternalError(f"the index answered {reply}")
    await until(lambda: router.control.version >= reply.version, JOIN_S, LOOK_S)
    return [fault.reason for fault in router.control.faults]


def _submit(
    mesh: SimulatedMesh, name: str, answers: list[Answer], prompt: Sequence[int], params: SamplingParams
) -> None:
    answer = Answer(f"dry-{len(answers)}", list(prompt), params, mesh.loop.now)
    answer.strategy = name
    answers.append(answer)
    mesh.seats["gateway-0"].service.submit(answer, mesh.address("router-0"), ttl_s=TTL_S)


def _judge(answers: Sequence[Answer]) -> list[str]:
    problems: list[str] = []
    for answer in answers:
        if not answer.is_complete:
            outcome = answer.outcome or "it has not ended"
            problems.append(f"a request was not served: {outcome} {answer.detail}".rstrip())
        problems += judge_answer(answer)
    return problems
