"""What an engine's actions have taken, as spans: each as long as its durations say, child of who asked."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import pytest

from microserve.protocol.errors import EngineLost
from microserve.protocol.messages import engine as wire
from microserve.protocol.tracing import output
from microserve.protocol.tracing.traceparent import make
from microserve.services.engine.core import trace
from tests.support.engine.core_mesh import GREEDY, ROUTER, Engine, Mesh, grant_for, prompt_of
from tests.support.process.spans import Kept

CLIENT = make(is_sampled=True)


@pytest.fixture
def kept() -> Iterator[Kept]:
    kept = Kept()
    output.use(kept)
    yield kept
    output.use(None)


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    mesh = Mesh()
    yield mesh
    mesh.close()


def generate(engine: Engine, traceparent: str, request_id: str = "r") -> None:
    message = wire.StartGenerate(engine.mesh.call(), request_id, 0, GREEDY, 60.0, traceparent=traceparent)
    engine.core.actions.start_generate(ROUTER, message, prompt_of(9), engine.mesh.now)


def test_a_generation_is_as_long_as_its_timings(mesh: Mesh, kept: Kept) -> None:
    generate(mesh.a, CLIENT.text)
    assert not kept.spans
    mesh.run()
    [span] = kept.spans
    assert (span.name, span.own.trace_id, span.parent_id) == (
        "start_generate",
        CLIENT.trace_id,
        CLIENT.span_id,
    )
    timings = mesh.a.finished["r"].timings
    assert span.ended - span.begun == pytest.approx(sum(msgspec.structs.astuple(timings)))
    assert (span.values["input_tokens"], span.values["output_tokens"]) == (9, GREEDY.max_tokens)


def test_a_send_is_its_senders(mesh: Mesh, kept: Kept) -> None:
    prompt = prompt_of(16)
    grant = grant_for(mesh.b, "r", prompt, 16).grant
    message = wire.RemoteSend(mesh.call(), "r", 0, 16, grant, 0, 60.0, traceparent=CLIENT.text)
    mesh.a.core.actions.remote_send(ROUTER, message, prompt, mesh.now)
    mesh.run()
    [span] = kept.spans
    assert (span.name, span.parent_id, span.values["receiver"]) == ("remote_send", CLIENT.span_id, "b")
    assert span.values["sent_tokens"] == 16


def test_what_is_aborted_ends_as_that(mesh: Mesh, kept: Kept) -> None:
    generate(mesh.a, CLIENT.text)
    mesh.a.core.actions.abort(ROUTER, wire.Abort(mesh.call(), "r"), mesh.now)
    mesh.run()
    [span] = kept.spans
    assert (span.values["finish_reasons"], span.error) == (["abort"], "")


def test_a_grant_and_a_failed_send_have_spans(mesh: Mesh, kept: Kept) -> None:
    grant = grant_for(mesh.b, "r", prompt_of(16), 16).grant
    trace.granted(CLIENT.text, "r", 0.5, grant)
    trace.send_failed(CLIENT.text, "r", 1.5, EngineLost("gone"))
    granted, failed = kept.spans
    assert (granted.name, granted.values["end"], granted.error) == ("prep_recv", 16, "")
    assert granted.ended - granted.begun == pytest.approx(0.5)
    assert (failed.name, failed.error) == ("remote_send", "engine_lost")


@pytest.mark.parametrize("traceparent", ["", "junk", f"00-{'1' * 32}-{'2' * 16}-00"])
def test_an_action_in_no_trace_is_done_as_ever(mesh: Mesh, kept: Kept, traceparent: str) -> None:
    generate(mesh.a, traceparent)
    mesh.run()
    assert mesh.a.finished["r"].reason == "length"
    assert not kept.spans
