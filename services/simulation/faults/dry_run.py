"""One strategy served in a small simulated mesh before it is published: what would go wrong, in words.

Owns the requests of a dry run and what counts as a problem. The strategy comes to the simulated routers the
way it comes to real ones, through the index. Nothing fails in this mesh, so whatever goes wrong is the
strategy's doing. What neither ends nor awaits must be ended from outside.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass

from microserve.protocol import log
from microserve.protocol.errors import InternalError, MeshError
from microserve.protocol.messages.control import PUBLISH, Change, Changed, Scalar
from microserve.services.index.service import IndexService
from microserve.services.router.oversight.overseer import Overseer
from microserve.services.router.rollout.window import MIN_ERRORS
from microserve.services.router.service import Router
from microserve.services.simulation.faults.campaign import NOTICE_S, REST_S
from microserve.services.simulation.faults.judge import judge_answer, judge_rest
from microserve.services.simulation.faults.scenario import draw
from microserve.services.simulation.gateway import Answer
from microserve.services.simulation.journal import Journal
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

Labels = Sequence[Sequence[str]]
"""Of each engine."""


@dataclass(frozen=True)
class Trial:
    problems: list[str]
    request_s: float
    """Mean time of a request, virtual seconds."""


def try_strategy(
    name: str,
    source: str,
    parameters: dict[str, Scalar],
    labels: Labels,
    overseer: Overseer | None = None,
) -> Trial:
    """Serve a few requests with it; with ``source`` empty, by the ``name`` that routers come with.

    With an overseer its decisions have a budget of real time too.
    """
    loop = VirtualLoop()
    journal = Journal(loop, keep=False)
    journal.open()
    answers: list[Answer] = []
    problems: list[str] = []
    try:
        problems += loop.run(_run(loop, journal, answers, name, source, parameters, labels, overseer))
    except MeshError as error:
        problems.append(error.detail)
    finally:
        journal.close()
    problems += [_plainly(line) for line in journal.defects] + loop.failures
    if (num_slow := journal.events[log.STRATEGY_SLOW]) >= MIN_ERRORS:  # one or two may be the machine's doing
        problems.append(
            f"it held the router for too long at a time, in {num_slow} of {len(answers)} requests"
        )
    times = [answer.ended_at - answer.submitted_at for answer in answers if answer.outcome]
    unique = list(dict.fromkeys(problems))[:MAX_PROBLEMS]
    return Trial(unique, sum(times) / len(times) if times else 0.0)


def _plainly(line: str) -> str:
    """What a line of the journal says went wrong: the last line of its traceback, or else its error."""
    text, _, trace = line.partition(" trace=")
    told = [each for each in trace.splitlines() if each and not each.startswith(" ")]
    found = told[-1] if told else text.partition(" error=")[2] or text
    return re.sub(r"^microserve\.[\w.]*\.(\w+: )", r"\1", found)


async def _run(
    loop: VirtualLoop,
    journal: Journal,
    answers: list[Answer],
    name: str,
    source: str,
    parameters: dict[str, Scalar],
    labels: Labels,
    overseer: Overseer | None,
) -> list[str]:
    labels = labels[:MAX_ENGINES] or [[]]
    shape = Shape(
        num_engines=len(labels), num_blocks=256, labels=tuple(tuple(each) for each in labels), max_skew_s=0.0
    )
    mesh = SimulatedMesh(loop, 1, shape, journal, overseer)
    try:
        mesh.start_all()
        await until(lambda: _is_together(mesh), JOIN_S, LOOK_S)
        if source:
            problems = await _publish(mesh, name, source, parameters)
            if problems:
                return problems
        for number in range(NUM_REQUESTS):
            answers.append(_submit(mesh, name, number))
            await asyncio.sleep(GAP_S)
        await until(lambda: all(answer.outcome for answer in answers), 2 * TTL_S, LOOK_S)
        return await _judge(mesh, answers)
    finally:
        mesh.close()


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


def _submit(mesh: SimulatedMesh, name: str, number: int) -> Answer:
    # Prompts, lengths and sampling as the campaign draws them.
    template = draw(number).arrivals[0]
    answer = Answer(f"dry-{number}", list(template.prompt), template.params, mesh.loop.now)
    answer.strategy = name
    gateway = mesh.seats["gateway-0"].service
    gateway.submit(answer, mesh.address("router-0"), ttl_s=TTL_S)
    return answer


async def _judge(mesh: SimulatedMesh, answers: Sequence[Answer]) -> list[str]:
    problems: list[str] = []
    for answer in answers:
        if not answer.is_complete:
            outcome = answer.outcome or "it has not ended"
            problems.append(f"a request was not served: {outcome} {answer.detail}".rstrip())
        problems += judge_answer(answer)
    await asyncio.sleep(NOTICE_S)
    await until(lambda: not judge_rest(mesh), REST_S)
    return problems + judge_rest(mesh)
