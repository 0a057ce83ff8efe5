"""Spans on their way out of a process: to a collector, or nowhere, and then at no cost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from time import monotonic
from typing import TYPE_CHECKING

import pytest

from microserve.protocol.tracing import output
from microserve.protocol.tracing.names import NAMES, Value, names_of
from microserve.protocol.tracing.span import Event, Kind, Span
from microserve.protocol.tracing.traceparent import TraceParent, make

if TYPE_CHECKING:
    from tests.support.process.otlp_collector import Collector

PROGRAM = """
import asyncio, os, sys
{before}
from microserve.protocol.settings.sources import load_settings
from microserve.protocol.process.run import run_service

def load():
    import microserve.gateway.server, microserve.services.index.service, microserve.services.router.service
    import microserve.services.engine.service
    return serve

async def serve(settings, bus, lifecycle):
    lifecycle.ready("here")
    os.write(1, b"sdk\\n" if any(name.startswith("opentelemetry.") for name in sys.modules) else b"none\\n")

sys.exit(run_service("index", load_settings(overrides=["bus.insecure=true"]), load))
"""


def run(before: str = "", **environment: str) -> tuple[str, list[str]]:
    """What a service says of the SDK, and its events."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    program = [sys.executable, "-P", "-c", PROGRAM.format(before=before)]
    done = subprocess.run(
        program, capture_output=True, text=True, timeout=120, env={**clean, **environment}, check=True
    )
    lines = (done.stdout + done.stderr).splitlines()
    [said] = [line for line in lines if line in ("sdk", "none")]
    return said, [json.loads(line)["event"] for line in lines if line.startswith("{")]


@pytest.mark.slow
def test_without_an_endpoint_the_sdk_is_not_imported() -> None:
    said, events = run()
    assert said == "none"
    assert not [event for event in events if event.startswith("tracing.")]


@pytest.mark.slow
def test_a_missing_extra_is_said_once_and_the_service_serves() -> None:
    said, events = run(
        "sys.modules['opentelemetry'] = None", OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9"
    )
    assert said == "none"
    assert events.count("tracing.failed") == 1
    assert "service.ready" in events


@pytest.mark.slow
def test_a_service_with_a_collector_that_is_away_ends_as_ever() -> None:
    said, events = run(OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9")
    assert said == "sdk"
    assert {"tracing.started", "service.stopped"} <= {*events}


@pytest.mark.parametrize(
    ("environment", "is_wanted"),
    [
        ({}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c:4318/v1/traces"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318", "OTEL_SDK_DISABLED": "true"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318", "OTEL_TRACES_EXPORTER": "none"}, False),
    ],
)
def test_the_environment_says_whether_there_are_spans(environment: dict[str, str], is_wanted: bool) -> None:
    assert output.is_wanted(environment) == is_wanted


def test_names_are_in_both_conventions_and_no_two_are_one() -> None:
    assert names_of("output_tokens") == ("gen_ai.usage.output_tokens", "gen_ai.usage.completion_tokens")
    assert names_of("engines") == ("microserve.engines",)
    every = [name for names in NAMES.values() for name in names]
    assert len(every) == len({*every})
    assert not [name for name in every if "prompt" in name and "tokens" not in name]


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    from tests.support.process.otlp_collector import Collector  # the SDK costs more than all that is quick

    with Collector() as collector:
        for name, value in collector.environment.items():
            monkeypatch.setenv(name, value)
        output.open_output("gateway", "g-1")
        assert output.is_on()
        try:
            yield collector
        finally:
            output.close_output()
        assert not output.is_on()


def span_of(name: str, own: TraceParent, now: float, values: dict[str, Value | None]) -> list[Span]:
    return [Span(name, own, "", now, now, values)]


@pytest.mark.slow
def test_a_span_arrives_as_it_was_told(collector: Collector) -> None:
    parent, now = make(is_sampled=True), monotonic()
    own = parent.child()
    events = [Event("pick", now - 0.4, {"engine": "e0"})]
    span = Span(
        "serve x", own, parent.span_id, now - 0.5, now, {"attempts": 1}, Kind.INTERNAL, events, "busy"
    )
    output.tell(lambda: [span])
    [got] = collector.wait(parent.trace_id, lambda spans: len(spans) == 1)
    assert (got.service, got.instance, got.name) == ("microserve-gateway", "g-1", "serve x")
    assert (got.trace_id, got.span_id, got.parent_id) == (own.trace_id, own.span_id, parent.span_id)
    assert abs(got.ended_ns - got.begun_ns - 500_000_000) < 1000
    assert got.attributes == {"microserve.attempts": 1, "error.type": "busy"}
    assert got.events == [("pick", {"microserve.engine": "e0"})]
    assert got.is_error


@pytest.mark.slow
def test_what_is_not_sampled_is_not_sent(collector: Collector) -> None:
    quiet, loud, now = make(is_sampled=False), make(is_sampled=True), monotonic()
    for own in (quiet, loud):
        output.tell(span_of, "chat m", own, now, {})
    collector.wait(loud.trace_id, lambda spans: len(spans) == 1)
    assert not collector.of(quiet.trace_id)


@pytest.mark.slow
def test_one_that_cannot_be_made_or_sent_keeps_none_of_the_others_back(collector: Collector) -> None:
    own, now = make(is_sampled=True), monotonic()
    for number, most in enumerate((1, 2**63, 2)):
        output.tell(span_of, f"n{number}", own.child(), now, {"most": most})
        output.tell(span_of, "it has no name that")
    got = collector.wait(own.trace_id, lambda spans: len(spans) == 2)
    assert [(span.name, span.attributes) for span in got] == [
        ("n0", {"microserve.most": 1}),
        ("n2", {"microserve.most": 2}),
    ]
