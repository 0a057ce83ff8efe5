"""From what clients got and engines did to a run's figures.

Owns what is counted as what: a failed request has no times but its end, simulated tokens become real ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from microserve.protocol.errors import QueueFull
from microserve.services.simulation.gateway import Answer
from microserve.services.simulation.load.engine import Hardware
from microserve.services.simulation.load.figures.result import (
    EngineUse,
    LengthBucket,
    PointResult,
    Row,
    Spread,
)
from microserve.services.simulation.load.task import Point

SHORTEST_BUCKET = 512
"""Prompts below that are in one bucket; each of the next is twice as wide."""


def measured(
    point: Point, answers: Sequence[Answer], hardware: Hardware, engines: Sequence[str], digest: str
) -> PointResult:
    """``engines``: ids of all there were. Not before a request has come."""
    served = [answer for answer in answers if answer.is_complete]
    num_refused = sum(answer.outcome == QueueFull.code for answer in answers)
    ttfts = [answer.first_token_at - answer.submitted_at for answer in served]
    tpots = [_tpot_s(point, answer) or 0.0 for answer in served]
    num_within = sum(
        ttft <= point.slo_ttft_s and tpot <= point.slo_tpot_s for ttft, tpot in zip(ttfts, tpots, strict=True)
    )
    num_prompt_tokens = point.scale * sum(len(answer.prompt) for answer in served)
    num_requests = len(point.requests)
    begin_s = min(answer.submitted_at for answer in answers)
    span_s = max(answer.ended_at for answer in answers) - begin_s
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
        Spread.of([tpot for answer in served if (tpot := _tpot_s(point, answer)) is not None]),
        Spread.of([answer.ended_at - answer.submitted_at for answer in served]),
        round(num_within / num_requests, 6),
        round(point.load * num_within / num_requests, 6),
        round(1 - hardware.num_prefill_tokens / num_prompt_tokens, 6) if served else 0.0,
        round(hardware.num_put_nbytes / 1e9, 3),
        round(span_s, 3),
        point.scale,
        digest,
        point.seed,
        _by_length(point, answers),
        _engines(answers, hardware, engines, span_s),
    )


def rows_of(point: Point, answers: Sequence[Answer]) -> list[Row]:
    """In the order in which they came."""
    begin_s = min((answer.submitted_at for answer in answers), default=0.0)
    return [
        Row(
            strategy=point.strategy,
            load=point.load,
            seed=point.seed,
            request=number,
            at_s=round(answer.submitted_at - begin_s, 6),
            tenant=answer.tenant,
            priority=answer.priority,
            attributes=answer.attributes,
            prompt_tokens=request.num_prompt_tokens,
            cached_tokens=point.scale * answer.ended.usage.cached_tokens if answer.ended else 0,
            received_tokens=point.scale * answer.ended.usage.received_tokens if answer.ended else 0,
            output_tokens=_num_output_tokens(point, answer),
            outcome=answer.outcome,
            ttft_s=round(answer.first_token_at - answer.submitted_at, 6) if answer.token_ids else None,
            tpot_s=_tpot_s(point, answer),
            jct_s=round(answer.ended_at - answer.submitted_at, 6),
            engines=answer.ended.engines if answer.ended else [],
            why=answer.ended.why if answer.ended else "",
        )
        for number, (request, answer) in enumerate(zip(point.requests, answers, strict=True))
    ]


def _num_output_tokens(point: Point, answer: Answer) -> int:
    """The first one is real, each of the others stands for several."""
    return 1 + point.scale * (len(answer.token_ids) - 1) if answer.token_ids else 0


def _tpot_s(point: Point, answer: Answer) -> float | None:
    """None: fewer than two tokens came."""
    num_later = point.scale * (len(answer.token_ids) - 1)
    return (answer.ended_at - answer.first_token_at) / num_later if num_later > 0 else None


def _by_length(point: Point, answers: Sequence[Answer]) -> list[LengthBucket]:
    counts: Counter[int] = Counter()
    ttfts: dict[int, list[float]] = {}
    for request, answer in zip(point.requests, answers, strict=False):
        number = (request.num_prompt_tokens // SHORTEST_BUCKET).bit_length()
        counts[number] += 1
        if answer.is_complete:
            ttfts.setdefault(number, []).append(answer.first_token_at - answer.submitted_at)
    return [
        LengthBucket(
            SHORTEST_BUCKET << (number - 1) if number else 0,
            SHORTEST_BUCKET << number,
            counts[number],
            len(ttfts.get(number, ())),
            Spread.of(ttfts.get(number, ())),
        )
        for number in sorted(counts)
    ]


def _engines(
    answers: Sequence[Answer], hardware: Hardware, engines: Sequence[str], span_s: float
) -> list[EngineUse]:
    took_part = Counter(engine for answer in answers if answer.ended for engine in answer.ended.engines)
    found = []
    for engine in engines:
        work = hardware.work[engine]
        found.append(
            EngineUse(
                engine,
                round(work.busy_s / span_s, 6) if span_s else 0.0,
                work.num_prompt_tokens,
                work.num_output_tokens,
                round(work.kv_sum / work.num_looks, 6) if work.num_looks else 0.0,
                round(work.kv_peak, 6),
                took_part[engine],
            )
        )
    return found
