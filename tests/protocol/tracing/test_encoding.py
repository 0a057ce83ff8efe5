"""Spans as OTLP's messages: equal to what the SDK's own encoder makes of the same ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pytest

from microserve.protocol.tracing.names import NAMES, Value
from microserve.protocol.tracing.span import Event, Kind, Span
from microserve.protocol.tracing.traceparent import make

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource

pytestmark = pytest.mark.slow  # the SDK costs more than all that is quick

VALUES: dict[str, Value | None] = {
    "model": "Größe ß",
    "request_id": "",
    "output_tokens": 3,
    "cached_tokens": 0,
    "most": 2**63 - 1,
    "least": -(2**63),
    "temperature": 0.0,
    "ttft_s": 0.123456789,
    "endless": float("inf"),
    "stream": True,
    "alone": False,
    "engines": ["e0", "e1"],
    "finish_reasons": [],
    "heaps": ("shm",),
    "reasoning_tokens": None,
}
ROOT = make(is_sampled=True)
SPANS = [
    Span("chat m", ROOT, "", 1.0, 2.5, VALUES),
    Span("attempt 1", ROOT.child(), ROOT.span_id, 1.25, 2.0, {}, Kind.INTERNAL),
    Span(
        "serve x",
        ROOT.child(),
        ROOT.span_id,
        1.125,
        2.25,
        {"attempts": 2},
        events=[Event("pick", 1.5, {"engine": "e0", "label": None}), Event("failover", 1.75)],
        error="engine_lost",
    ),
]


def wall_ns(at: float) -> int:
    return round(at * 1e9) + 1_796_000_000_000_000_000


def resource() -> Resource:
    from opentelemetry.sdk.resources import Resource

    return Resource({"service.name": "s", "n": 1, "parts": ["a", "b"]}, "https://schema")


def by_sdk(spans: Sequence[Span]) -> Any:
    """With an attribute for each name, as names.py has them."""
    from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
    from opentelemetry.sdk import trace as sdk
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope
    from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode

    def attributes(values: Mapping[str, Value | None]) -> dict[str, Any]:
        return {
            full: value
            for name, value in values.items()
            for full in NAMES.get(name, (f"microserve.{name}",))
            if value is not None
        }

    def made(span: Span) -> sdk.ReadableSpan:
        trace_id = int(span.own.trace_id, 16)
        parent = SpanContext(trace_id, int(span.parent_id, 16), is_remote=True) if span.parent_id else None
        return sdk.ReadableSpan(
            span.name,
            context=SpanContext(trace_id, int(span.own.span_id, 16), is_remote=False),
            parent=parent,
            resource=resource(),
            attributes=attributes({**span.values, "error": span.error or None}),
            events=[sdk.Event(each.name, attributes(each.values), wall_ns(each.at)) for each in span.events],
            kind={Kind.SERVER: SpanKind.SERVER, Kind.INTERNAL: SpanKind.INTERNAL}[span.kind],
            status=Status(StatusCode.ERROR, span.error) if span.error else Status(StatusCode.UNSET),
            start_time=wall_ns(span.begun),
            end_time=wall_ns(span.ended),
            instrumentation_scope=InstrumentationScope("microserve"),
        )

    return encode_spans([made(span) for span in spans])


def test_a_request_is_what_the_sdk_makes_of_the_same_spans() -> None:
    from microserve.protocol.tracing.encoding import empty_request, write_span

    request = empty_request(resource())
    for span in SPANS:
        write_span(request.resource_spans[0].scope_spans[0].spans.add(), span, wall_ns)
    expected = by_sdk(SPANS)
    assert request == expected
    assert type(request).FromString(request.SerializeToString()) == expected
    assert request.SerializeToString(deterministic=True) == expected.SerializeToString(deterministic=True)


@pytest.mark.parametrize("values", [{"n": 2**63}, {"engines": [1]}, {"text": "\ud800"}])
def test_what_protobuf_cannot_carry_is_an_error(values: dict[str, Any]) -> None:
    from opentelemetry.proto.trace.v1.trace_pb2 import Span as Message

    from microserve.protocol.tracing.encoding import write_span

    with pytest.raises((ValueError, TypeError)):
        write_span(Message(), Span("x", ROOT, "", 1.0, 2.0, values), wall_ns)
