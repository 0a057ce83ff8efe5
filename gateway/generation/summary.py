"""The canonical line: one ``request.finished`` event per HTTP request and choice, whose phases add up.

    queued       HTTP arrival until tokenising began           (gateway)
    tokenised    tokenising                                    (gateway)
    routed       tokenised until the first action was sent     (router, and the bus up to the first token)
    granted, prefilled, transferred, admitted, first_token     (router)
    decoded      until the last byte was written               (router, the bus and delivery)

The router measures its phases by its own clock. What its share leaves of the time to the first token was
spent on the bus and goes to ``routed``; what is left after that was decoding and delivery. Phases are whole
microseconds and the last one is the remainder, so they add up to ``wall_s`` by construction.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import structlog

from microserve.gateway.text.answer.choice import Timeline
from microserve.gateway.view.forms import RequestForm
from microserve.protocol import log
from microserve.protocol.messages.numerics import UNKNOWN, Numerics
from microserve.protocol.messages.router import PHASES, ROUTER_PHASES, Phases

_logger = structlog.get_logger()


def phase_durations(times: Timeline, phases: Phases | None) -> dict[str, int]:
    """Microseconds of each phase, none negative; they add up to the time from arrival to the end."""
    assert times.ended is not None
    remaining = wall = _microseconds(times.ended - times.arrived)
    wanted = dict.fromkeys(PHASES, 0)
    if times.tokenising is None:
        wanted["queued"] = wall
    else:
        wanted["queued"] = _microseconds(times.tokenising - times.arrived)
        tokenised_at = times.ended if times.submitted is None else times.submitted
        wanted["tokenised"] = _microseconds(tokenised_at - times.tokenising)
    if times.submitted is not None:
        for name in ROUTER_PHASES:
            wanted[name] = _microseconds(getattr(phases, f"{name}_s")) if phases is not None else 0
        # Without a first token all of the waiting was waiting for it.
        waited_until = times.ended if times.first_token is None else times.first_token
        on_the_bus = _microseconds(waited_until - times.submitted) - sum(
            wanted[name] for name in ROUTER_PHASES
        )
        wanted["routed"] += max(0, on_the_bus)
    durations: dict[str, int] = {}
    for name in PHASES[:-1]:
        # Two clocks may disagree by a little: no phase takes more than there is left.
        durations[name] = min(wanted[name], remaining)
        remaining -= durations[name]
    durations["decoded"] = remaining
    return durations


def _microseconds(seconds: float) -> int:
    return max(0, round(seconds * 1e6)) if math.isfinite(seconds) else 0


@dataclass(slots=True)
class Summary:
    """Everything that the line says beside the phases."""

    request_id: str
    """The choice's id on the bus: the same one as in the router's and the engines' logs."""
    http_request_id: str
    """As in ``x-request-id``."""
    times: Timeline
    status: int = 0
    """0: the client went before there was one."""
    code: str = ""
    model: str = ""
    key: str = ""
    """Name of the client's API key; empty where none is asked for."""
    index: int = 0
    strategy: str = ""
    strategy_version: int = 0
    share: str = ""
    """As what the version served it: ``stable`` or ``canary``."""
    moves: int = 0
    alone: str = ""
    """Why one engine alone served it, whatever the strategy says."""
    heaps: list[str] = field(default_factory=list)
    """Kinds of heap that its KV was sent through."""
    engines: list[str] = field(default_factory=list)
    numerics: Numerics = UNKNOWN
    finish_reason: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    received_tokens: int = 0
    output_tokens: int = 0
    phases: Phases | None = None
    path: str = ""
    stream: bool = False
    why: str = ""
    """How the router chose the engines."""
    capped_to: int = 0
    """Most output tokens by the word of the strategy; 0: as asked for."""
    attributes: Mapping[str, str | None] = field(default_factory=dict)
    """What strategies were told; None for what is told to nobody else."""


def form_of(summary: Summary, durations: Mapping[str, int], at: float) -> RequestForm:
    """The line as the view has it; ``durations``: :func:`phase_durations`; ``at``: when it ended, by the wall
    clock."""
    return RequestForm(
        id=summary.request_id,
        http_id=summary.http_request_id,
        at=at,
        age_s=0.0,
        path=summary.path,
        stream=summary.stream,
        status=summary.status,
        code=summary.code,
        finish_reason=summary.finish_reason,
        model=summary.model,
        key=summary.key,
        strategy=summary.strategy,
        strategy_version=summary.strategy_version,
        share=summary.share,
        engines=summary.engines,
        heaps=summary.heaps,
        why=summary.why,
        alone=summary.alone,
        moves=summary.moves,
        numerics=summary.numerics.name,
        exact=summary.numerics.is_exact,
        prompt_tokens=summary.prompt_tokens,
        cached_tokens=summary.cached_tokens,
        received_tokens=summary.received_tokens,
        output_tokens=summary.output_tokens,
        ttft_s=_ttft_s(summary.times),
        wall_s=sum(durations.values()) / 1e6,
        phases_s={name: microseconds / 1e6 for name, microseconds in durations.items()},
    )


def _ttft_s(times: Timeline) -> float | None:
    return None if times.first_token is None else _microseconds(times.first_token - times.arrived) / 1e6


def write_line(summary: Summary, durations: Mapping[str, int]) -> None:
    """``durations``: :func:`phase_durations`."""
    _logger.info(
        log.REQUEST_FINISHED,
        request_id=summary.request_id,
        http_request_id=summary.http_request_id,
        index=summary.index,
        path=summary.path,
        stream=summary.stream,
        status=summary.status,
        code=summary.code,
        finish_reason=summary.finish_reason,
        model=summary.model,
        key=summary.key,
        strategy=summary.strategy,
        strategy_version=summary.strategy_version,
        share=summary.share,
        moves=summary.moves,
        alone=summary.alone,
        engines=summary.engines,
        heaps=summary.heaps,
        why=summary.why,
        numerics=summary.numerics.name,
        exact=summary.numerics.is_exact,
        prompt_tokens=summary.prompt_tokens,
        cached_tokens=summary.cached_tokens,
        received_tokens=summary.received_tokens,
        output_tokens=summary.output_tokens,
        capped_to=summary.capped_to,
        attributes=summary.attributes,
        ttft_s=_ttft_s(summary.times),
        wall_s=sum(durations.values()) / 1e6,
        **{f"{name}_s": microseconds / 1e6 for name, microseconds in durations.items()},
    )
