"""A collector as OpenTelemetry's own protocol has it, over HTTP on loopback: what services send, kept."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

WAIT_S = 60.0


@dataclass(frozen=True)
class Received:
    """One span as it came."""

    service: str
    instance: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    begun_ns: int
    ended_ns: int
    attributes: dict[str, Any]
    events: list[tuple[str, dict[str, Any]]]
    is_error: bool


class Collector:
    """Serves while it is entered."""

    def __init__(self) -> None:
        self.spans: list[Received] = []
        self._news = threading.Condition()
        take = self._take

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                assert self.path == "/v1/traces"
                take(ExportTraceServiceRequest.FromString(body))
                answer = ExportTraceServiceResponse().SerializeToString()
                self.send_response(200)
                self.send_header("content-type", "application/x-protobuf")
                self.send_header("content-length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def environment(self) -> dict[str, str]:
        """For a service that is to send here, and soon."""
        endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        return {
            "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
            "OTEL_BSP_SCHEDULE_DELAY": "50",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def of(self, trace_id: str) -> list[Received]:
        with self._news:
            return [span for span in self.spans if span.trace_id == trace_id]

    def wait(self, trace_id: str, is_whole: Callable[[list[Received]], bool]) -> list[Received]:
        """The trace, once it is whole."""
        with self._news:
            found = self._news.wait_for(
                lambda: is_whole([span for span in self.spans if span.trace_id == trace_id]), WAIT_S
            )
            spans = [span for span in self.spans if span.trace_id == trace_id]
        assert found, [(span.service, span.name) for span in spans]
        return spans

    def wait_for(self, is_it: Callable[[Received], bool]) -> Received:
        """The first span of this kind."""
        with self._news:
            assert self._news.wait_for(lambda: any(is_it(span) for span in self.spans), WAIT_S)
            return next(span for span in self.spans if is_it(span))

    def _take(self, request: ExportTraceServiceRequest) -> None:
        with self._news:
            for each in request.resource_spans:
                resource = _values(each.resource.attributes)
                for scope in each.scope_spans:
                    self.spans += [_received(resource, span) for span in scope.spans]
            self._news.notify_all()


def _received(resource: dict[str, Any], span: Any) -> Received:
    return Received(
        service=resource["service.name"],
        instance=resource["service.instance.id"],
        name=span.name,
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        begun_ns=span.start_time_unix_nano,
        ended_ns=span.end_time_unix_nano,
        attributes=_values(span.attributes),
        events=[(event.name, _values(event.attributes)) for event in span.events],
        is_error=span.status.code == 2,
    )


def _values(attributes: Any) -> dict[str, Any]:
    return {each.key: _value(each.value) for each in attributes}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(each) for each in value.array_value.values]
    return getattr(value, kind)
