"""Spans of an engine's actions, each made after the action has ended here, of the durations that it reports.

One function an action, called under the engine's lock, once a request and never for a token: it says what the
span is to be made of, and that only of an action that is in a trace.
"""

from __future__ import annotations

from collections.abc import Mapping
from time import monotonic

from microserve.protocol.errors import MeshError
from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.kv.grant import Grant
from microserve.protocol.tracing import output
from microserve.protocol.tracing.names import Value
from microserve.protocol.tracing.span import Span
from microserve.protocol.tracing.traceparent import parse


def granted(traceparent: str, request_id: str, seconds: float, grant: Grant) -> None:
    """``seconds``: from the message to the grant."""
    if traceparent:
        output.tell(_granted, traceparent, monotonic(), seconds, request_id, grant)


def sent(traceparent: str, seconds: float, answer: wire.Sent, grant: Grant) -> None:
    """All is put."""
    if traceparent:
        output.tell(_sent, traceparent, monotonic(), seconds, answer, grant)


def send_failed(traceparent: str, request_id: str, seconds: float, error: MeshError) -> None:
    if traceparent:
        values = {"request_id": request_id}
        output.tell(_made, "remote_send", traceparent, monotonic(), seconds, values, error.code)


def generated(traceparent: str, request_id: str, seconds: float, finished: wire.Finished) -> None:
    """A generation has ended, in whatever way."""
    if traceparent:
        output.tell(_generated, traceparent, monotonic(), seconds, request_id, finished)


def _granted(traceparent: str, now: float, seconds: float, request_id: str, grant: Grant) -> list[Span]:
    values: dict[str, Value | None] = {
        "request_id": request_id,
        "grant_id": grant.grant_id,
        "end": grant.end,
        "matched_tokens": grant.matched,
    }
    return _made("prep_recv", traceparent, now, seconds, values)


def _sent(traceparent: str, now: float, seconds: float, answer: wire.Sent, grant: Grant) -> list[Span]:
    values: dict[str, Value | None] = {
        "request_id": answer.request_id,
        "grant_id": grant.grant_id,
        "receiver": grant.engine_id,
        "computed_tokens": answer.computed,
        "cached_tokens": answer.cached,
        "sent_tokens": answer.sent,
        "nbytes": answer.nbytes,
        "heap": answer.heap or None,
        **_timings(answer.timings),
    }
    return _made("remote_send", traceparent, now, seconds, values)


def _generated(
    traceparent: str, now: float, seconds: float, request_id: str, finished: wire.Finished
) -> list[Span]:
    usage = finished.usage
    values: dict[str, Value | None] = {
        "request_id": request_id,
        "finish_reasons": [finished.reason],
        "input_tokens": usage.prompt_tokens,
        "cached_tokens": usage.cached_tokens,
        "received_tokens": usage.received_tokens,
        "output_tokens": usage.output_tokens,
        "preemptions": usage.num_preemptions,
        "numerics": finished.numerics.name,
        **_timings(finished.timings),
    }
    return _made("start_generate", traceparent, now, seconds, values, finished.code)


def _timings(timings: wire.Timings) -> dict[str, float]:
    return {name: getattr(timings, name) for name in wire.Timings.__struct_fields__}


def _made(
    name: str,
    traceparent: str,
    now: float,
    seconds: float,
    values: Mapping[str, Value | None],
    error: str = "",
) -> list[Span]:
    """It ended at ``now``. An engine's own clock may have any zero, so it is told how long it took."""
    parent = parse(traceparent)
    if parent is None:
        return []
    begun = now - max(0.0, seconds)
    return [Span(name, parent.child(), parent.span_id, begun, now, values, error=error)]
