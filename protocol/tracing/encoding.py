"""Spans as messages of OTLP, by its own protobuf classes.

The SDK's encoder makes the same messages (a test compares the two), through objects of its own, at about four
times the cost: those bytes are made beside a service's loop, under the one lock that Python has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1 import trace_pb2 as otlp
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext

from microserve.protocol.tracing.names import Value, names_of
from microserve.protocol.tracing.span import Kind, Span

_KINDS = {Kind.SERVER: otlp.Span.SPAN_KIND_SERVER, Kind.INTERNAL: otlp.Span.SPAN_KIND_INTERNAL}
_KNOWN: int = otlp.SPAN_FLAGS_CONTEXT_HAS_IS_REMOTE_MASK
_REMOTE: int = otlp.SPAN_FLAGS_CONTEXT_HAS_IS_REMOTE_MASK | otlp.SPAN_FLAGS_CONTEXT_IS_REMOTE_MASK
_names_of = lru_cache(1024)(names_of)


def empty_request(resource: Resource) -> ExportTraceServiceRequest:
    """What the requests of one process have in common, in the SDK's own words; spans go to the only scope of
    the only resource."""
    one = ReadableSpan(
        "",
        SpanContext(1, 1, is_remote=False),
        resource=resource,
        instrumentation_scope=InstrumentationScope("microserve"),
    )
    request = encode_spans([one])
    del request.resource_spans[0].scope_spans[0].spans[:]
    return request


def write_span(into: otlp.Span, span: Span, wall_ns: Callable[[float], int]) -> None:
    """``into``: an empty one. ``wall_ns``: of a moment by ``time.monotonic``, nanoseconds since 1970. Raises
    what protobuf raises for a value that it cannot carry."""
    into.trace_id = bytes.fromhex(span.own.trace_id)
    into.span_id = bytes.fromhex(span.own.span_id)
    into.flags = _KNOWN
    if span.parent_id:
        into.parent_span_id = bytes.fromhex(span.parent_id)
        into.flags = _REMOTE
    into.name = span.name
    into.kind = _KINDS[span.kind]
    into.start_time_unix_nano = wall_ns(span.begun)
    into.end_time_unix_nano = wall_ns(span.ended)
    _write(into.attributes, span.values)
    into.status.code = otlp.Status.STATUS_CODE_UNSET
    if span.error:
        _write(into.attributes, {"error": span.error})
        into.status.code, into.status.message = otlp.Status.STATUS_CODE_ERROR, span.error
    for each in span.events:
        event = into.events.add()
        event.name = each.name
        event.time_unix_nano = wall_ns(each.at)
        _write(event.attributes, each.values)


def _write(attributes: Any, values: Mapping[str, Value | None]) -> None:
    """Each under all of its names; what is None is left out."""
    for name, value in values.items():
        if value is None:
            continue
        for full_name in _names_of(name):
            attribute = attributes.add()
            attribute.key = full_name
            _set(attribute.value, value)


def _set(into: AnyValue, value: Value) -> None:
    match value:
        case str():
            into.string_value = value
        case bool():
            into.bool_value = value
        case int():
            into.int_value = value
        case float():
            into.double_value = value
        case _:
            into.array_value.SetInParent()
            for each in value:
                into.array_value.values.add().string_value = each
