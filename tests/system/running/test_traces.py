"""Traces of a real mesh, at a collector of OpenTelemetry's own protocol: one connected trace a request, also
after a live move and after an engine was killed."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from microserve.protocol.tracing.traceparent import TraceParent, make
from tests.support.process.otlp_collector import Collector, Received
from tests.support.process.processes import MeshProcesses

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

PROMPT = [20 + number * 7 % 200 for number in range(300)]
SHORT, LONG = 32, 900


def body(max_tokens: int, **more: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": PROMPT, "max_tokens": max_tokens, "ignore_eos": True, **more}


def headers(client: TraceParent, strategy: str) -> dict[str, str]:
    return {"traceparent": client.text, "x-microserve-strategy": strategy}


@contextmanager
def streaming(url: str, client: TraceParent, strategy: str) -> Iterator[tuple[str, Iterator[str]]]:
    """A long answer in its midst: the engine that generates it, and the lines that are still to come."""
    asked: dict[str, Any] = {
        "json": body(LONG, stream=True),
        "headers": headers(client, strategy),
        "timeout": 120,
    }
    with httpx.stream("POST", f"{url}/v1/completions", **asked) as response:
        assert response.status_code == 200, response.read()
        lines = response.iter_lines()
        for _ in range(20):
            next(lines)
        yield response.headers["x-microserve-engines"].split(",")[-1], lines


def named(spans: list[Received], name: str) -> list[Received]:
    return [span for span in spans if span.name.startswith(name)]


def assert_connected(spans: list[Received], client: TraceParent) -> None:
    """Every span but the gateway's has its parent among them, and no span begins before its parent does, or
    after it has ended."""
    by_id = {span.span_id: span for span in spans}
    assert len(by_id) == len(spans)
    [root] = [span for span in spans if span.parent_id == client.span_id]
    for span in spans:
        assert span.begun_ns <= span.ended_ns
        if span is not root:
            parent = by_id[span.parent_id]
            assert parent.begun_ns <= span.begun_ns <= parent.ended_ns, (span, parent)
    of_whole = [root, *named(spans, "serve"), *named(spans, "attempt")]
    # What an attempt left behind may end after it; the answer's end was told when all of its own had ended.
    last = max(named(spans, "start_generate"), key=lambda span: span.ended_ns)
    for span in [*of_whole[1:], *([last] if not last.is_error else [])]:
        assert span.ended_ns <= by_id[span.parent_id].ended_ns, (span, by_id[span.parent_id])


def test_a_request_is_one_trace_whatever_happens_to_it(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Collector() as collector:
        for name, value in collector.environment.items():
            monkeypatch.setenv(name, value)
        with MeshProcesses(tiny_model, tmp_path, num_engines=3, gateway=True) as mesh:
            _balanced(mesh, collector)
            _moved(mesh, collector)
            _failed_over(mesh, collector)
            _not_sampled(mesh, collector)
    # No prompt and no answer in any of it.
    assert not any("content" in key or "messages" in key for s in collector.spans for key in s.attributes)


def _balanced(mesh: MeshProcesses, collector: Collector) -> None:
    client = make(is_sampled=True)
    url = f"{mesh.gateway_url}/v1/completions"
    answer = httpx.post(url, json=body(SHORT), headers=headers(client, "balanced"), timeout=120)
    assert answer.status_code == 200, answer.text
    assert "traceparent" not in answer.headers

    def is_whole(spans: list[Received]) -> bool:
        return bool(named(spans, "text_completion") and named(spans, "serve")) and all(
            named(spans, name) for name in ("prep_recv", "remote_send", "start_generate")
        )

    spans = collector.wait(client.trace_id, is_whole)
    assert_connected(spans, client)
    [root], [serve], [attempt] = (named(spans, name) for name in ("text_completion", "serve", "attempt 1"))
    assert (root.service, serve.service) == ("microserve-gateway", "microserve-router")
    assert (serve.name, serve.parent_id, attempt.parent_id) == (
        "serve balanced",
        root.span_id,
        serve.span_id,
    )
    [send], [generate] = named(spans, "remote_send"), named(spans, "start_generate")
    assert {send.parent_id, generate.parent_id} == {attempt.span_id}
    assert {send.instance, generate.instance} == {*answer.headers["x-microserve-engines"].split(",")}
    assert send.attributes["microserve.receiver"] == generate.instance
    for usage in ("gen_ai.usage.output_tokens", "gen_ai.usage.completion_tokens"):
        assert root.attributes[usage] == generate.attributes[usage] == SHORT
    assert root.attributes["gen_ai.usage.input_tokens"] == len(PROMPT)
    assert root.attributes["gen_ai.response.finish_reasons"] == ["length"]
    phases = [value for key, value in root.attributes.items() if key.startswith("microserve.phase.")]
    assert sum(phases) == pytest.approx((root.ended_ns - root.begun_ns) / 1e9, abs=1e-4)
    assert [name for name, _ in root.events] == ["tokenising", "submitted", "first_token"]
    picked = {values["microserve.engine"] for name, values in serve.events if name == "pick"}
    assert {send.instance, generate.instance} <= picked


def _moved(mesh: MeshProcesses, collector: Collector) -> None:
    """The engine that generates leaves; its KV goes to another one."""
    client = make(is_sampled=True)
    with streaming(mesh.gateway_url, client, "data_parallel") as (engine, lines):
        mesh.services[engine].process.send_signal(signal.SIGTERM)
        assert [*lines][-2:] == ["data: [DONE]", ""]
    spans = collector.wait(client.trace_id, lambda spans: len(named(spans, "text_completion")) == 1)
    spans = collector.wait(
        client.trace_id, lambda spans: len(named(spans, "attempt")) > 1 and _has_last(spans)
    )
    assert_connected(spans, client)
    [serve] = named(spans, "serve")
    assert "departure" in [name for name, _ in serve.events]
    moved = [span for span in named(spans, "attempt") if span.attributes["microserve.strategy"] == "move"]
    assert moved
    sends = [span for span in named(spans, "remote_send") if span.instance == engine]
    assert sends[-1].parent_id in {span.span_id for span in moved}
    mesh.services[engine].process.wait(60)
    mesh.stop(engine)


def _failed_over(mesh: MeshProcesses, collector: Collector) -> None:
    """The engine that generates is killed: what it did has no span, and all else is one trace."""
    client = make(is_sampled=True)
    with streaming(mesh.gateway_url, client, "data_parallel") as (engine, lines):
        mesh.services[engine].kill()
        assert [*lines][-2:] == ["data: [DONE]", ""]
    spans = collector.wait(client.trace_id, _has_last)
    assert_connected(spans, client)
    [serve] = named(spans, "serve")
    first, *_, last = sorted(named(spans, "attempt"), key=lambda span: span.begun_ns)
    assert first.is_error and first.attributes["error.type"] == "engine_lost"
    assert "failover" in [name for name, _ in serve.events]
    assert not serve.is_error
    assert not last.is_error
    [generate] = named(spans, "start_generate")
    assert (generate.parent_id, generate.instance != engine) == (last.span_id, True)


def _has_last(spans: list[Received]) -> bool:
    """All that ended well is here: the gateway, the router, and the engine of the last attempt."""
    attempts = sorted(named(spans, "attempt"), key=lambda span: span.begun_ns)
    return (
        bool(named(spans, "text_completion") and named(spans, "serve") and attempts)
        and len(attempts) == named(spans, "serve")[0].attributes["microserve.attempts"]
        and any(span.parent_id == attempts[-1].span_id for span in named(spans, "start_generate"))
    )


def _not_sampled(mesh: MeshProcesses, collector: Collector) -> None:
    """Whoever began the trace does not record it: nobody does. What is no ``traceparent`` is none."""
    quiet = make(is_sampled=False)
    url = f"{mesh.gateway_url}/v1/completions"
    for given in (quiet.text, "00-nothing"):
        asked = {"traceparent": given, "x-request-id": "of-a-wrong-one" if given != quiet.text else "quiet"}
        answer = httpx.post(url, json=body(2), headers=asked, timeout=120)
        assert answer.status_code == 200, answer.text
    root = collector.wait_for(lambda s: s.attributes.get("microserve.http_request_id") == "of-a-wrong-one")
    assert root.parent_id == ""
    assert not collector.of(quiet.trace_id)
