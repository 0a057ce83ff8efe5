"""Spans to a collector by OTLP, with OpenTelemetry's SDK: its batches, its thread, its variables.

The only file that imports ``opentelemetry`` (extra ``otel``). Spans come with ids that were made when their
children were sent, and have ended already, so they go to the SDK's batch processor as they are and no tracer
makes them.
"""

from __future__ import annotations

import threading
import time
from queue import SimpleQueue

import structlog
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

from microserve.protocol import log
from microserve.protocol.tracing.names import named
from microserve.protocol.tracing.span import Kind, Span

CLOSE_S = 2.0
"""Longest wait for the collector when a service stops."""
MAKE_S = 0.05
MAX_TOLD = 4096
"""Of spans that are not made yet; more are dropped, as the SDK drops what its own queue cannot hold."""
_REFRESH_S = 60.0
_KINDS = {Kind.SERVER: SpanKind.SERVER, Kind.INTERNAL: SpanKind.INTERNAL}
_SCOPE = InstrumentationScope("microserve")
_SAMPLED = TraceFlags(TraceFlags.SAMPLED)
_FINE = Status(StatusCode.UNSET)
_logger = structlog.get_logger()


class Exporter:
    """The SDK's processor, and what all spans of this process have in common."""

    def __init__(self, service: str, service_id: str) -> None:
        """Raises what the SDK raises for variables that it cannot use."""
        resource = Resource.create(
            {"service.namespace": "microserve", "service.instance.id": service_id, "microserve.role": service}
        )
        if str(resource.attributes.get(SERVICE_NAME, "unknown_service")).startswith("unknown_service"):
            resource = resource.merge(Resource({SERVICE_NAME: f"microserve-{service}"}))
        self._resource = resource
        self._processor = BatchSpanProcessor(OTLPSpanExporter())
        self._clock = WallClock()
        self._told: SimpleQueue[Span | None] = SimpleQueue()
        self._is_over = threading.Event()
        self._making = threading.Thread(target=self._make, name="traces", daemon=True)
        self._making.start()

    def tell(self, span: Span) -> None:
        """The SDK's words for it cost more than a message does, and are found in a thread, a little later."""
        if self._told.qsize() < MAX_TOLD:
            self._told.put(span)

    def _make(self) -> None:
        """An idle process is not woken; in a busy one spans wait for each other, away from their request."""
        while (span := self._told.get()) is not None:
            if self._told.empty():
                self._is_over.wait(MAKE_S)
            try:
                self._processor.on_end(self._made(span))
            except Exception as error:  # one that the SDK does not take keeps none of the others back
                _logger.warning(log.TRACING_FAILED, error=str(error) or type(error).__name__)

    def _shutdown(self) -> None:
        self._making.join(CLOSE_S)
        self._processor.shutdown()  # type: ignore[no-untyped-call]

    def close(self) -> None:
        self._is_over.set()
        self._told.put(None)
        closing = threading.Thread(target=self._shutdown, name="close traces", daemon=True)
        closing.start()  # the SDK waits for as long as its exporter does
        closing.join(CLOSE_S)

    def _made(self, span: Span) -> ReadableSpan:
        trace_id, at = int(span.own.trace_id, 16), self._clock.wall_ns
        parent = None
        if span.parent_id:
            parent = SpanContext(trace_id, int(span.parent_id, 16), is_remote=True, trace_flags=_SAMPLED)
        return ReadableSpan(
            span.name,
            context=SpanContext(trace_id, int(span.own.span_id, 16), is_remote=False, trace_flags=_SAMPLED),
            parent=parent,
            resource=self._resource,
            attributes=named({**span.values, "error": span.error or None}),
            events=[Event(each.name, named(each.values), at(each.at)) for each in span.events],
            kind=_KINDS[span.kind],
            status=Status(StatusCode.ERROR, span.error) if span.error else _FINE,
            start_time=at(span.begun),
            end_time=at(span.ended),
            instrumentation_scope=_SCOPE,
        )


class WallClock:
    """What the wall clock said at a moment of the monotonic one.

    How far they are apart is measured now and then, not for each span: a process that loses its core between
    the two readings would have its span moved by as long.
    """

    def __init__(self) -> None:
        self._apart_ns = 0
        self._measured_at = float("-inf")

    def wall_ns(self, at: float) -> int:
        now = time.monotonic()
        if now - self._measured_at > _REFRESH_S:
            self._apart_ns, self._measured_at = min(_apart() for _ in range(5))[1], now
        return round(at * 1e9) + self._apart_ns


def _apart() -> tuple[int, int]:
    """How long it took to read both clocks, and how far they are apart."""
    before = time.monotonic_ns()
    wall = time.time_ns()
    after = time.monotonic_ns()
    return after - before, wall - (before + after) // 2
