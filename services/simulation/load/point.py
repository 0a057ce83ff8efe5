"""One point of a plot of time over load: one strategy under one load, and what its clients would have seen.

A trace is served by a mesh of profiled engines (engine.py).

Owns the requests' times and what is made of them. The same point gives the same result, byte for byte.
"""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import NamedTuple, TextIO

from microserve.protocol import log
from microserve.protocol.errors import InternalError, StrategyError
from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.protocol.settings.settings import RouterSettings, Settings
from microserve.services.router.oversight.overseer import Overseer
from microserve.services.router.rollout.window import MAX_ERROR_SHARE, MIN_ERRORS
from microserve.services.simulation.gateway import Answer
from microserve.services.simulation.journal import Journal, plainly
from microserve.services.simulation.load.engine import Hardware, ProfiledMesh
from microserve.services.simulation.load.figures.result import PointResult, Row
from microserve.services.simulation.load.measure import measured, rows_of
from microserve.services.simulation.load.progress import Progress
from microserve.services.simulation.load.task import Point
from microserve.services.simulation.load.trace import HASH_TOKENS, TraceRequest, arrivals
from microserve.services.simulation.load.work import KvWatch
from microserve.services.simulation.loop import TimeStandsStill, VirtualLoop
from microserve.services.simulation.mesh import Shape, until

TOKEN_PARAMETERS = {
    "auto": ("tau", "threshold"),
    "balanced_adaptive": ("min_share",),
    "conditional": ("max_tokens", "prefill_busy"),
    "prfaas": ("threshold",),
}
"""Parameters of built-in strategies that count tokens: a simulated mesh counts ``scale`` of them as one."""
JOIN_S = 10.0
LOOK_S = 0.05
ROUTER = "router-0"
GATEWAY = "gateway-0"


class Judged(NamedTuple):
    """A run, and what there is to say of it."""

    result: PointResult
    note: str
    """Of how long the strategy took, by the real clock; empty: nothing."""
    rows: list[Row]
    """One for each request, if they were asked for."""


def run_point(point: Point) -> PointResult:
    """As :func:`judged_point`, the figures alone."""
    return judged_point(point).result


def judged_point(point: Point, told: TextIO | None = None) -> Judged:
    """Serve it; ``told`` hears how far it has got.

    Raises :class:`ConfigError` for parameters or a file that the router refuses, :class:`StrategyError` for a
    strategy that makes a mistake, hangs or never ends, and :class:`InternalError` when the mesh breaks."""
    settings = _router(point)
    progress = Progress(point.strategy, len(point.requests), point.max_wall_s, told)
    try:
        with Overseer(settings.strategy_budget_s) as overseer:
            return _run_point(point, settings, overseer, progress)
    except TimeStandsStill as error:
        raise StrategyError(f"{point.strategy} goes round and round: {error.detail}") from None
    finally:
        progress.close()


def _run_point(point: Point, settings: RouterSettings, overseer: Overseer, progress: Progress) -> Judged:
    loop = VirtualLoop()
    journal = Journal(loop, keep=False)
    journal.open()
    product = Settings()
    max_tokens, is_calm = product.engine.max_num_batched_tokens, not point.trouble.is_any
    hardware = Hardware(point.profile, point.scale, max_tokens, is_calm)
    answers: list[Answer] = []
    try:
        # Made here: a wrong setting is an error of the caller, not of the mesh.
        shape = _shape(point, product)
        mesh = ProfiledMesh(loop, point.seed, shape, journal, hardware, settings, overseer=overseer)
        loop.run(_serve(mesh, point, answers, progress))
    finally:
        journal.close()
    if mistakes := [line for line in journal.defects if f" {log.STRATEGY_FAILED} " in line]:
        raise StrategyError(f"{point.strategy}: {plainly(mistakes[0])}")
    if loop.failures or journal.defects:
        raise InternalError(f"the simulated mesh broke: {(loop.failures + journal.defects)[0]}")
    return Judged(
        measured(point, answers, hardware, mesh.engines, journal.digest),
        _slowness(point, settings, journal, len(answers)),
        rows_of(point, answers) if point.with_rows else [],
    )


def _slowness(point: Point, settings: RouterSettings, journal: Journal, num_requests: int) -> str:
    """What routers would take a version back for; empty: they would not."""
    num_slow = journal.events[log.STRATEGY_SLOW]
    if num_slow < MIN_ERRORS or num_slow <= MAX_ERROR_SHARE * num_requests:
        return ""
    return (
        f"{point.strategy} held the router for longer than {settings.strategy_budget_s:g} s at a time, in "
        f"{num_slow} of {num_requests} requests: routers would take it back"
    )


def _shape(point: Point, product: Settings) -> Shape:
    block_size = HASH_TOKENS // point.scale
    num_blocks = point.profile.num_kv_tokens // HASH_TOKENS
    return Shape(
        num_engines=point.num_engines,
        num_blocks=num_blocks,
        block_size=block_size,
        grant_slots=product.kvcache.grant_slots,
        max_num_seqs=product.engine.max_num_seqs,
        max_num_batched_tokens=product.engine.max_num_batched_tokens,
        max_waiting=product.engine.max_waiting,
        max_model_len=num_blocks * block_size,
        lease_s=product.kvcache.lease_s,
        labels=point.labels,
        max_skew_s=0.0,
    )


def _router(point: Point) -> RouterSettings:
    return RouterSettings(
        default_strategy=point.strategy,
        check_interval_s=0.0,
        strategies=point.parameters,
        strategy_files=[point.file] if point.file else [],
        record_requests=len(point.requests) if point.with_rows else 0,
    )


async def _serve(mesh: ProfiledMesh, point: Point, answers: list[Answer], progress: Progress) -> None:
    ttl_s = Settings().gateway.request_timeout_s
    try:
        mesh.start_all()
        await until(partial(_is_together, mesh), JOIN_S, LOOK_S)
        if not _is_together(mesh):
            raise InternalError(f"the simulated mesh did not come together within {JOIN_S:g} s")
        begin_s = mesh.loop.now
        point.trouble.lay(mesh, point.seed, begin_s)
        work, watch = mesh.hardware.work, KvWatch(mesh, mesh.hardware.work.__getitem__)
        due = arrivals(point.requests, point.load, point.seed)

        def submit(number: int) -> None:
            """And see to the next one: a timer for each of them would be in the way of all others."""
            if number + 1 < len(due):
                mesh.loop.at(begin_s + due[number + 1], submit, number + 1)
            _submit(mesh, point, number, point.requests[number], answers, ttl_s)

        mesh.loop.at(begin_s + due[0], submit, 0)
        pending = deque(range(len(point.requests)))  # the first of them is looked at, and no others

        def is_served() -> bool:
            while pending and pending[0] < len(answers) and answers[pending[0]].outcome:
                pending.popleft()
            watch.look()
            num_tokens = sum(each.num_output_tokens for each in work.values())
            loop, is_awaited = mesh.loop, bool(pending) and pending[0] < len(answers)
            progress.look(loop.now - begin_s, loop.num_callbacks, num_tokens, is_awaited, count_ended)
            return not pending

        def count_ended() -> int:
            return sum(bool(answer.outcome) for answer in answers)

        await until(is_served, due[-1] + 2 * ttl_s)
    finally:
        mesh.close()


def _is_together(mesh: ProfiledMesh) -> bool:
    router, gateway = mesh.seats[ROUTER].service, mesh.seats[GATEWAY].service
    if router is None or gateway is None or gateway.num_usable == 0:
        return False
    return len(router.registry.usable()) == len(mesh.engines)


def _submit(
    mesh: ProfiledMesh,
    point: Point,
    number: int,
    request: TraceRequest,
    answers: list[Answer],
    ttl_s: float,
) -> None:
    params = SamplingParams(max_tokens=request.num_steps(point.scale), temperature=0.0, ignore_eos=True)
    answer = Answer(f"r{number}", request.prompt(point.scale), params, mesh.loop.now)
    answer.strategy = point.strategy
    answer.tenant, answer.priority = request.tenant, request.priority
    answer.attributes = dict(request.attributes)
    answers.append(answer)
    mesh.seats[GATEWAY].service.submit(answer, mesh.address(ROUTER), ttl_s=ttl_s)
