"""One point of a plot of time over load: one strategy under one load, and what its clients would have seen.

A trace is served by a mesh of profiled engines (engine.py).

Owns the requests' times and what is made of them. The same point gives the same result, byte for byte.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import msgspec
import numpy as np

from microserve.protocol import log
from microserve.protocol.errors import InternalError, QueueFull, StrategyError
from microserve.protocol.messages.control import Scalar
from microserve.protocol.messages.sampling import SamplingParams
from microserve.protocol.settings import RouterSettings, Settings
from microserve.services.router.oversight.overseer import Overseer
from microserve.services.router.rollout.window import MAX_ERROR_SHARE, MIN_ERRORS
from microserve.services.simulation.gateway import Answer
from microserve.services.simulation.journal import Journal, plainly
from microserve.services.simulation.load.engine import Hardware, ProfiledMesh
from microserve.services.simulation.load.timing import Profile
from microserve.services.simulation.load.trace import HASH_TOKENS, TraceRequest, arrivals
from microserve.services.simulation.loop import VirtualLoop
from microserve.services.simulation.mesh import Shape, until

TOKEN_PARAMETERS = {
    "auto": ("tau", "threshold"),
    "balanced_adaptive": ("min_share",),
    "conditional": ("max_tokens", "prefill_busy"),
}
"""Parameters of built-in strategies that count tokens: a simulated mesh counts ``scale`` of them as one."""
JOIN_S = 10.0
LOOK_S = 0.05
ROUTER = "router-0"
GATEWAY = "gateway-0"


@dataclass(frozen=True)
class Point:
    """One strategy under one load: everything that decides what comes out."""

    strategy: str
    file: str
    """Where the strategy is from; empty: built in."""
    load: float
    """Requests a second."""
    requests: Sequence[TraceRequest]
    profile: Profile
    num_engines: int
    labels: tuple[tuple[str, ...], ...]
    scale: int
    seed: int
    parameters: dict[str, dict[str, Scalar]]
    """As the router takes them."""
    slo_ttft_s: float
    slo_tpot_s: float


class Spread(msgspec.Struct, frozen=True):
    """Of one time over all requests that were served, in seconds; 0 without any."""

    mean: float = 0.0
    p50: float = 0.0
    p90: float = 0.0
    p99: float = 0.0

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if not values:
            return cls()
        p50, p90, p99 = np.percentile(values, (50, 90, 99))
        return cls(*(round(float(value), 6) for value in (np.mean(values), p50, p90, p99)))


class PointResult(msgspec.Struct, frozen=True):
    """What came out."""

    strategy: str
    load: float
    profile: str
    num_engines: int
    labels: list[str]
    num_requests: int
    num_served: int
    num_refused: int
    """At once, with a hint when to come again."""
    num_failed: int
    ttft_s: Spread
    tpot_s: Spread
    jct_s: Spread
    slo_share: float
    """Of all requests, those served within both bounds."""
    goodput_per_s: float
    """That share of the load."""
    hit_rate: float
    """Of the served requests' prompt tokens, those that no engine computed; below 0: some twice."""
    sent_gb: float
    """KV put from engine to engine."""
    span_s: float
    """From the first request to the last answer, virtual seconds."""
    scale: int
    digest: str
    """Of all that happened, in order."""


def run_point(point: Point) -> PointResult:
    """As :func:`judged_point`, without the note."""
    return judged_point(point)[0]


def judged_point(point: Point) -> tuple[PointResult, str]:
    """Serve it; and what there is to say of how long the strategy took, by the real clock.

    Raises :class:`ConfigError` for parameters or a file that the router refuses, :class:`StrategyError` for a
    strategy that makes a mistake or hangs, and :class:`InternalError` when the mesh breaks."""
    settings = _router(point)
    with Overseer(settings.strategy_budget_s) as overseer:
        return _run_point(point, settings, overseer)


def _run_point(point: Point, settings: RouterSettings, overseer: Overseer) -> tuple[PointResult, str]:
    loop = VirtualLoop()
    journal = Journal(loop, keep=False)
    journal.open()
    product = Settings()
    hardware = Hardware(point.profile, point.scale, product.engine.max_num_batched_tokens)
    answers: list[Answer] = []
    try:
        # Made here: a wrong setting is an error of the caller, not of the mesh.
        shape = _shape(point, product)
        mesh = ProfiledMesh(loop, point.seed, shape, journal, hardware, settings, overseer=overseer)
        loop.run(_serve(mesh, point, answers))
    finally:
        journal.close()
    if mistakes := [line for line in journal.defects if f" {log.STRATEGY_FAILED} " in line]:
        raise StrategyError(f"{point.strategy}: {plainly(mistakes[0])}")
    if loop.failures or journal.defects:
        raise InternalError(f"the simulated mesh broke: {(loop.failures + journal.defects)[0]}")
    return _measured(point, answers, hardware, journal.digest), _slowness(
        point, settings, journal, len(answers)
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
        strategies=point.parameters,
        strategy_files=[point.file] if point.file else [],
    )


async def _serve(mesh: ProfiledMesh, point: Point, answers: list[Answer]) -> None:
    ttl_s = Settings().gateway.request_timeout_s
    try:
        mesh.start_all()
        await until(partial(_is_together, mesh), JOIN_S, LOOK_S)
        if not _is_together(mesh):
            raise InternalError(f"the simulated mesh did not come together within {JOIN_S:g} s")
        begin_s = mesh.loop.now
        due = arrivals(point.requests, point.load, point.seed)
        for number, (at_s, request) in enumerate(zip(due, point.requests, strict=True)):
            mesh.loop.at(begin_s + at_s, _submit, mesh, point, number, request, answers, ttl_s)
        pending = deque(range(len(point.requests)))  # the first of them is looked at, and no others

        def is_served() -> bool:
            while pending and pending[0] < len(answers) and answers[pending[0]].outcome:
                pending.popleft()
            return not pending

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


def _measured(point: Point, answers: Sequence[Answer], hardware: Hardware, digest: str) -> PointResult:
    served = [answer for answer in answers if answer.is_complete]
    num_refused = sum(answer.outcome == QueueFull.code for answer in answers)
    ttfts = [answer.first_token_at - answer.submitted_at for answer in served]
    num_later = [point.scale * (len(answer.token_ids) - 1) for answer in served]
    tpots = [
        (answer.ended_at - answer.first_token_at) / count if count else 0.0
        for answer, count in zip(served, num_later, strict=True)
    ]
    num_within = sum(
        ttft <= point.slo_ttft_s and tpot <= point.slo_tpot_s for ttft, tpot in zip(ttfts, tpots, strict=True)
    )
    num_prompt_tokens = point.scale * sum(len(answer.prompt) for answer in served)
    num_requests = len(point.requests)
    begin_s = min(answer.submitted_at for answer in answers)
    return PointResult(
        point.strategy,
        point.load,
        point.profile.name,
        point.num_engines,
        [label for labels in point.labels for label in labels],
        num_requests,
        len(served),
        num_refused,
        num_requests - len(served) - num_refused,
        Spread.of(ttfts),
        Spread.of([tpot for tpot, count in zip(tpots, num_later, strict=True) if count]),
        Spread.of([answer.ended_at - answer.submitted_at for answer in served]),
        round(num_within / num_requests, 6),
        round(point.load * num_within / num_requests, 6),
        round(1 - hardware.num_prefill_tokens / num_prompt_tokens, 6) if served else 0.0,
        round(hardware.num_put_nbytes / 1e9, 3),
        round(max(answer.ended_at for answer in answers) - begin_s, 3),
        point.scale,
        digest,
    )
