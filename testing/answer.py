"""What came of a request in a mesh in memory, and how it was served: plain values, for assertions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from microserve.protocol.messages.strategy.control import Scalar
from microserve.protocol.messages.strategy.decisions import Explanation
from microserve.services.simulation.gateway import Answer as SimulatedAnswer


class Send(NamedTuple):
    """One ``remote_send`` that had something to send: KV of prompt tokens ``[begin, end)``."""

    source: str
    target: str
    begin: int
    end: int


class Picked(NamedTuple):
    """One ``mesh.pick``."""

    label: str | None
    chosen: str
    by: str
    """What counted first: ``load``, ``prefix``, ``cost`` or ``scorers``."""
    candidates: tuple[str, ...]
    """Engine ids that it chose from."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How a request was served: what the last run of the strategy for it did."""

    generated_on: str
    """Engine id; empty: it did not come to that."""
    generated_from: int
    """First prompt token that this engine computed itself, or had in its cache."""
    sends: list[Send]
    picks: list[Picked]
    notes: list[tuple[str, dict[str, Scalar]]]
    """What the strategy said (``mesh.note``): text and values."""
    engines: tuple[str, ...]
    """That took part, over all attempts."""
    num_attempts: int
    """Runs of a strategy for the request: more than one after an engine's failure, or a mistake."""
    num_tokens: int
    """Of the prompt."""

    @property
    def prefilled(self) -> dict[str, list[tuple[int, int]]]:
        """Which part of the prompt each engine brought, by engine id: intervals ``[begin, end)``."""
        parts: dict[str, list[tuple[int, int]]] = {}
        for send in self.sends:
            parts.setdefault(send.source, []).append((send.begin, send.end))
        if self.generated_on and self.generated_from < self.num_tokens:
            parts.setdefault(self.generated_on, []).append((self.generated_from, self.num_tokens))
        return parts


@dataclass(frozen=True, slots=True)
class Answer:
    """What a client got. Times are virtual seconds from when it asked."""

    request_id: str
    token_ids: list[int]
    reason: str
    """``stop``, ``length``, ``abort`` (it left), or an error's code, such as ``queue_full``."""
    detail: str
    """Of an error, in words."""
    ttft_s: float | None
    """Until the first token; None: there was none."""
    total_s: float
    num_cached_tokens: int
    """Of the prompt, in the cache of the engine that generated."""
    num_received_tokens: int
    """Of the prompt, sent there by others."""
    plan: Plan = field(repr=False)

    @property
    def is_good(self) -> bool:
        """All of it came."""
        return self.reason in ("stop", "length")


def answer_of(answer: SimulatedAnswer, explained: Explanation | None) -> Answer:
    """Of a request that has ended; ``explained``: what its router remembers of it, if it was admitted."""
    usage = answer.ended.usage if answer.ended is not None else None
    return Answer(
        answer.request_id,
        list(answer.token_ids),
        answer.outcome,
        answer.detail,
        answer.first_token_at - answer.submitted_at if answer.token_ids else None,
        answer.ended_at - answer.submitted_at,
        usage.cached_tokens if usage is not None else 0,
        usage.received_tokens if usage is not None else 0,
        _plan(answer, explained),
    )


def _plan(answer: SimulatedAnswer, explained: Explanation | None) -> Plan:
    engines = tuple(answer.ended.engines) if answer.ended is not None else ()
    if explained is None or not explained.attempts:
        return Plan("", 0, [], [], [], engines, 0, len(answer.prompt))
    last = explained.attempts[-1]
    return Plan(
        last.engine_id,
        last.begin,
        [Send(each.source, each.target, each.begin, each.end) for each in last.sends],
        [Picked(each.label, each.chosen, each.by, tuple(each.candidates)) for each in last.picks],
        [(note.text, note.values) for note in last.notes],
        engines,
        explained.num_attempts,
        len(answer.prompt),
    )
