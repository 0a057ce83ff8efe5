"""Spans to a collector by OTLP, with OpenTelemetry's SDK: its batches, thread, retries and variables.

Spans come with ids that were made when their children were sent, and have ended already, so they go to the
SDK's batch processor as they are and no tracer makes them. A service's loop only puts into a queue what they
are to be made of. One thread makes them, the SDK's makes messages of them (encoding.py) and sends those.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import structlog
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExportResult
from opentelemetry.trace import SpanContext, TraceFlags

from microserve.protocol import log
from microserve.protocol.tracing.encoding import empty_request, write_span
from microserve.protocol.tracing.span import Make, Span

CLOSE_S = 2.0
"""Longest wait for the collector when a service stops."""
MAKE_S = 0.5
"""Between two looks at what was told: the loop need not wake anybody for it."""
MAX_TOLD = 4096
"""Not made yet; of more the oldest are dropped, as the SDK drops what its own queue cannot hold."""
AT_ONCE = 16
"""Made without a pause: a loop that wants Python's lock meanwhile waits for a third of a millisecond."""
PAUSE_S = 0.001
_REFRESH_S = 60.0
_SAMPLED = SpanContext(1, 1, is_remote=False, trace_flags=TraceFlags(TraceFlags.SAMPLED))
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
        self._processor = BatchSpanProcessor(_Sender(resource))
        self._told: deque[tuple[Make, tuple[Any, ...]]] = deque(maxlen=MAX_TOLD)
        self._is_over = threading.Event()
        self._making = threading.Thread(target=self._make, name="traces", daemon=True)
        self._making.start()

    def tell(self, make: Make, given: tuple[Any, ...]) -> None:
        self._told.append((make, given))

    def _make(self) -> None:
        is_over = False
        while not is_over:
            is_over = self._is_over.wait(MAKE_S)
            for number in range(1, len(self._told) + 1):
                make, given = self._told.popleft()
                try:
                    for span in make(*given):
                        if span.own.is_sampled:
                            self._processor.on_end(_Told(span))
                except Exception as error:  # one that cannot be made keeps none of the others back
                    _logger.warning(log.TRACING_FAILED, error=str(error) or type(error).__name__)
                if not number % AT_ONCE:
                    time.sleep(PAUSE_S)

    def _shutdown(self) -> None:
        self._making.join(CLOSE_S)
        self._processor.shutdown()  # type: ignore[no-untyped-call]

    def close(self) -> None:
        self._is_over.set()
        closing = threading.Thread(target=self._shutdown, name="close traces", daemon=True)
        closing.start()  # the SDK waits for as long as its exporter does
        closing.join(CLOSE_S)


class _Told(ReadableSpan):
    """As the processor takes it, which asks of a span whether it is sampled, and nothing else."""

    context = _SAMPLED

    def __init__(self, span: Span) -> None:
        self.span = span


class _Sender(OTLPSpanExporter):
    """The SDK's exporter, but for the making of what it sends."""

    def __init__(self, resource: Resource) -> None:
        super().__init__()
        self._empty = empty_request(resource)
        self._clock = WallClock()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        request = type(self._empty)()
        request.CopyFrom(self._empty)
        into = request.resource_spans[0].scope_spans[0].spans
        for number, told in enumerate(spans, 1):
            assert isinstance(told, _Told)
            try:
                write_span(into.add(), told.span, self._clock.wall_ns)
            except Exception as error:  # one that protobuf does not take keeps none of the others back
                del into[-1]
                _logger.warning(log.TRACING_FAILED, error=str(error) or type(error).__name__)
            if not number % AT_ONCE:
                time.sleep(PAUSE_S)
        sent = self._client.export(request.SerializeToString())
        return SpanExportResult.SUCCESS if sent.success else SpanExportResult.FAILURE


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
