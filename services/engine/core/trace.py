"""Spans of an engine's actions, each made when the action has ended here, of the durations that it reports.

One function an action; where nobody wants spans, or the action is in no trace, each returns at once. Called
under the engine's lock, once a request and never for a token.
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
    if not (output.is_on() and traceparent):
        return
    values: dict[str, Value | None] = {
        "request_id": request_id,
        "grant_id": grant.grant_id,
        "end": grant.end,
        "matched_tokens": grant.matched,
    }
    _tell("prep_recv", traceparent, seconds, values)


def sent(traceparent: str, seconds: float, answer: wire.Sent, grant: Grant) -> None:
    """All is put."""
    if not (output.is_on() and traceparent):
        return
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
    _tell("remote_send", traceparent, seconds, values)


def send_failed(traceparent: str, request_id: str, seconds: float, error: MeshError) -> None:
    if output.is_on() and traceparent:
        _tell("remote_send", traceparent, seconds, {"request_id": request_id}, error.code)


def generated(traceparent: str, request_id: str, seconds: float, finished: wire.Finished) -> None:
    """A generation has ended, in whatever way."""
    if not (output.is_on() and traceparent):
        return
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
    _tell("start_generate", traceparent, seconds, values, finished.code)


def _timings(timings: wire.Timings) -> dict[str, float]:
    return {name: getattr(timings, name) for name in wire.Timings.__struct_fields__}


def _tell(
    name: str, traceparent: str, seconds: float, values: Mapping[str, Value | None], error: str = ""
) -> None:
    """It ends now. An engine's own clock may have any zero, so it is told how long it took."""
    parent = parse(traceparent)
    if parent is not None and parent.is_sampled:
        now = monotonic()
        output.tell(
            Span(name, parent.child(), parent.span_id, now - max(0.0, seconds), now, values, error=error)
        )
