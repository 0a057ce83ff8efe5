"""One request's spans in this router: one of all of it, one of each attempt, made after it has ended.

    serve STRATEGY      from when it came until its end was told; events: picks, failovers
      attempt n         each with an id that was made as it began: its engines' spans are its children

Where nobody wants spans, what the gateway sent is relayed to engines as it is (:class:`Relay`). Sans-I/O but
for the clock, which is not the loop's: uvloop's has milliseconds only.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import monotonic

import msgspec

from microserve.protocol.messages.router import Ended, Phases
from microserve.protocol.tracing import output
from microserve.protocol.tracing.names import Value
from microserve.protocol.tracing.span import Event, Kind, Span
from microserve.protocol.tracing.traceparent import TraceParent, parse, relayed
from microserve.services.router.request.trail import Trail


class Relay:
    """No spans are made here; those of engines are the gateway's children."""

    def __init__(self, traceparent: str) -> None:
        self._traceparent = traceparent

    def begin(self, strategy: str, version: int) -> str:
        return self._traceparent

    def failed(self, code: str) -> None:
        pass

    def stop(self, code: str) -> None:
        pass

    def tell(self, request_id: str, ended: Ended, trails: Sequence[Trail]) -> None:
        pass


UNTRACED = Relay("")


class _Attempt(msgspec.Struct):
    own: TraceParent
    strategy: str
    version: int
    begun: float
    ended: float | None = None
    code: str = ""


class Trace:
    def __init__(self, parent: TraceParent) -> None:
        self._parent = parent
        self._begun = self._ended = monotonic()
        self._attempts: list[_Attempt] = []

    def begin(self, strategy: str, version: int) -> str:
        """An attempt begins: what its actions say of where they stand."""
        attempt = _Attempt(self._parent.child(), strategy, version, monotonic())
        self._attempts.append(attempt)
        return attempt.own.text

    def failed(self, code: str) -> None:
        """The attempt that runs has ended, and another one follows. Empty: its engine leaves, which is no
        failure."""
        self._close(monotonic(), code)

    def stop(self, code: str) -> None:
        """It ends now, with an error or (empty) without: what its gateway is told next."""
        self._ended = monotonic()
        self._close(self._ended, code)

    def tell(self, request_id: str, ended: Ended, trails: Sequence[Trail]) -> None:
        """All of its spans are to be made. ``trails``: of its attempts, if they are kept."""
        output.tell(self._spans, request_id, ended, trails)

    def _spans(self, request_id: str, ended: Ended, trails: Sequence[Trail]) -> list[Span]:
        own, now, spans = self._parent.child(), self._ended, []
        for number, attempt in enumerate(self._attempts, 1):
            values: dict[str, Value | None] = {
                "request_id": request_id,
                "attempt": number,
                "strategy": attempt.strategy,
                "strategy_version": attempt.version,
            }
            spans.append(
                Span(
                    f"attempt {number}",
                    attempt.own,
                    own.span_id,
                    attempt.begun,
                    now if attempt.ended is None else attempt.ended,
                    values,
                    Kind.INTERNAL,
                    error=attempt.code,
                )
            )
        spans.append(
            Span(
                f"serve {ended.strategy}",
                own,
                self._parent.span_id,
                self._begun,
                now,
                {
                    "request_id": request_id,
                    "strategy": ended.strategy,
                    "strategy_version": ended.strategy_version,
                    "share": ended.share or None,
                    "engines": ended.engines,
                    "heaps": ended.heaps or None,
                    "moves": ended.num_moves,
                    "attempts": len(self._attempts),
                    "why": ended.why or None,
                    "alone": ended.alone or None,
                    "finish_reasons": [ended.reason],
                    "input_tokens": ended.usage.prompt_tokens,
                    "cached_tokens": ended.usage.cached_tokens,
                    "received_tokens": ended.usage.received_tokens,
                    "output_tokens": ended.usage.output_tokens,
                    **{f"phase.{name}": getattr(ended.phases, name) for name in Phases.__struct_fields__},
                },
                events=self._events(trails),
                error=ended.code,
            )
        )
        return spans

    def _close(self, now: float, code: str) -> None:
        if self._attempts and self._attempts[-1].ended is None:
            self._attempts[-1].ended, self._attempts[-1].code = now, code

    def _events(self, trails: Sequence[Trail]) -> list[Event]:
        events = [
            Event("pick", self._begun + at_s, {"label": label, "by": by, "engine": engine})
            for trail in trails
            for at_s, label, by, engine in trail.chosen()
        ]
        for attempt, following in zip(self._attempts, self._attempts[1:], strict=False):
            name = "failover" if attempt.code else "departure"
            events.append(Event(name, following.begun, {"code": attempt.code or None}))
        return sorted(events, key=lambda event: event.at)


def trace_of(traceparent: str) -> Trace | Relay:
    """Of a request that came with this."""
    if not traceparent:
        return UNTRACED
    if not output.is_on():
        return Relay(relayed(traceparent))
    parent = parse(traceparent)
    if parent is None:
        return UNTRACED
    return Trace(parent) if parent.is_sampled else Relay(parent.text)
