"""One request's spans in a router: ids told beforehand, attempts inside, failovers as events."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from microserve.protocol.messages.engine import Usage
from microserve.protocol.messages.router import Ended, Phases
from microserve.protocol.tracing import output
from microserve.protocol.tracing.span import Span
from microserve.protocol.tracing.traceparent import TraceParent, make, parse
from microserve.services.router.request.trace import Trace, trace_of
from tests.support.process.spans import Kept

ENDED = Ended("length", Usage(10, 2, 0, 4), Phases(1.0), "balanced", ["e0", "e1"], strategy_version=3)


@pytest.fixture
def kept() -> Iterator[Kept]:
    kept = Kept()
    output.use(kept)
    yield kept
    output.use(None)


def begin(parent: TraceParent) -> Trace:
    trace = trace_of(parent.text)
    assert isinstance(trace, Trace)
    return trace


def inside(child: Span, parent: Span) -> bool:
    is_its = (child.own.trace_id, child.parent_id) == (parent.own.trace_id, parent.own.span_id)
    return is_its and parent.begun <= child.begun <= child.ended <= parent.ended


def test_an_attempt_is_inside_and_engines_were_told_its_id_beforehand(kept: Kept) -> None:
    client = make(is_sampled=True)
    trace = begin(client)
    told = parse(trace.begin("balanced", 3))
    assert not kept.spans
    trace.stop(ENDED.code)
    trace.tell("r1", ENDED, [])
    attempt, serve = kept.spans
    assert (attempt.name, serve.name, serve.parent_id) == ("attempt 1", "serve balanced", client.span_id)
    assert attempt.own == told
    assert inside(attempt, serve)
    assert serve.values["output_tokens"] == 4
    assert not serve.error and not attempt.error


def test_each_attempt_has_a_span_and_a_failover_is_an_event(kept: Kept) -> None:
    trace = begin(make(is_sampled=True))
    told = [parse(trace.begin("balanced", 0))]
    trace.failed("engine_lost")
    told.append(parse(trace.begin("balanced", 0)))
    trace.failed("")  # its engine leaves
    told.append(parse(trace.begin("move", 0)))
    trace.stop(ENDED.code)
    trace.tell("r1", ENDED, [])
    *attempts, serve = kept.spans
    assert [span.own for span in attempts] == told
    assert [(span.name, span.error) for span in attempts] == [
        ("attempt 1", "engine_lost"),
        ("attempt 2", ""),
        ("attempt 3", ""),
    ]
    assert all(inside(span, serve) for span in attempts)
    assert [event.name for event in serve.events] == ["failover", "departure"]
    assert serve.values["attempts"] == 3


def test_what_the_request_failed_with_is_its_last_attempts_too(kept: Kept) -> None:
    trace = begin(make(is_sampled=True))
    trace.begin("balanced", 0)
    failed = Ended("error", Usage(), Phases(), "balanced", [], code="cache_full")
    trace.stop(failed.code)
    trace.tell("r1", failed, [])
    assert [span.error for span in kept.spans] == ["cache_full", "cache_full"]


def test_who_was_refused_has_no_attempt(kept: Kept) -> None:
    trace = begin(make(is_sampled=True))
    trace.stop("queue_full")
    trace.tell("r1", Ended("error", Usage(), Phases(), "auto", [], code="queue_full"), [])
    [serve] = kept.spans
    assert serve.error == "queue_full"


def test_a_trace_that_is_not_sampled_is_relayed(kept: Kept) -> None:
    quiet = make(is_sampled=False)
    trace = trace_of(quiet.text)
    assert trace.begin("auto", 0) == quiet.text
    trace.stop(ENDED.code)
    trace.tell("r1", ENDED, [])
    assert not kept.spans


@pytest.mark.parametrize("junk", ["", "junk", "00-" + "0" * 32 + "-" + "1" * 16 + "-01"])
@pytest.mark.parametrize("is_on", [False, True])
def test_junk_is_no_trace(junk: str, is_on: bool) -> None:
    kept = Kept()
    output.use(kept if is_on else None)
    try:
        trace = trace_of(junk)
        assert trace.begin("auto", 0) == ""
        trace.stop(ENDED.code)
        trace.tell("r1", ENDED, [])
    finally:
        output.use(None)
    assert not kept.spans


def test_where_nobody_wants_spans_the_gateways_is_passed_on() -> None:
    client = make(is_sampled=True)
    trace = trace_of(client.text)
    assert trace.begin("auto", 0) == client.text
    trace.failed("engine_lost")
    assert trace.begin("auto", 0) == client.text
    trace.stop(ENDED.code)
    trace.tell("r1", ENDED, [])
