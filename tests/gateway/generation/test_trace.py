"""A client's ``traceparent`` goes to the router, and nothing of it comes back; one span for a request."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest
from tokenizers import Tokenizer

from microserve.protocol.tracing import output
from microserve.protocol.tracing.traceparent import make, parse
from tests.support.gateway.gateway_world import Served, gateway_world, run
from tests.support.process.spans import Kept

pytestmark = pytest.mark.slow

CLIENT, QUIET = make(is_sampled=True), make(is_sampled=False)
HEADER = "traceparent"


def ask(
    model: Path, tokenizer: Tokenizer, *, is_on: bool, given: list[tuple[str, str]], **more: Any
) -> tuple[list[str], Kept, httpx.Response]:
    """What the router was told with each choice, the spans that were made, and the answer."""
    kept = Kept()
    output.use(kept if is_on else None)
    n = more.get("n", 1)

    async def main() -> tuple[list[str], httpx.Response]:
        async with gateway_world(model) as world, httpx.AsyncClient(base_url=world.address) as http:
            body = {"model": "tiny", "prompt": "secret words", **more}
            call = asyncio.ensure_future(http.post("/v1/completions", json=body, headers=given))
            served: list[Served] = [await world.router.request() for _ in range(n)]
            for each in served:
                each.send(tokenizer.encode("abc").ids, ended=each.ended("length"))
            reply = await call
            assert reply.status_code == 200, reply.text
            return [each.message.traceparent for each in served], reply

    try:
        told, reply = run(main())
    finally:
        output.use(None)
    assert HEADER not in reply.headers
    return told, kept, reply


def test_the_clients_trace_goes_on(model: Path, raw_tokenizer: Tokenizer) -> None:
    [told], kept, _ = ask(model, raw_tokenizer, is_on=True, given=[(HEADER, CLIENT.text)])
    [span] = kept.spans
    assert parse(told) == span.own
    assert (span.own.trace_id, span.parent_id) == (CLIENT.trace_id, CLIENT.span_id)
    assert span.name == "text_completion tiny"
    assert span.values["finish_reasons"] == ["length"]
    assert "secret" not in repr(span)


def test_all_choices_are_in_one_span(model: Path, raw_tokenizer: Tokenizer) -> None:
    told, kept, _ = ask(model, raw_tokenizer, is_on=True, given=[], n=3)
    [span] = kept.spans
    assert {parse(each) for each in told} == {span.own}
    assert (span.parent_id, span.own.is_sampled, span.values["num_choices"]) == ("", True, 3)


@pytest.mark.parametrize(
    "given",
    [
        [],
        [(HEADER, "junk")],
        [(HEADER, CLIENT.text), (HEADER, CLIENT.text)],
        [(HEADER, CLIENT.text + ",")],
    ],
)
@pytest.mark.parametrize("is_on", [False, True])
def test_without_a_valid_one_a_trace_begins_here(
    model: Path, raw_tokenizer: Tokenizer, given: list[tuple[str, str]], is_on: bool
) -> None:
    [told], kept, _ = ask(model, raw_tokenizer, is_on=is_on, given=given)
    parent = parse(told)
    assert parent is not None
    assert parent.trace_id != CLIENT.trace_id
    assert (parent.is_sampled, len(kept.spans)) == (is_on, int(is_on))


@pytest.mark.parametrize(("given", "is_on"), [(CLIENT, False), (QUIET, False), (QUIET, True)])
def test_without_a_span_here_the_clients_is_passed_on(
    model: Path, raw_tokenizer: Tokenizer, given: Any, is_on: bool
) -> None:
    told, kept, _ = ask(model, raw_tokenizer, is_on=is_on, given=[(HEADER, given.text)])
    assert told == [given.text]
    assert not kept.spans
