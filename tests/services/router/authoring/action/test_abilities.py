"""Engines of several kinds in one mesh: who is offered for what, and what is refused before it is sent."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

import msgspec
import pytest
import structlog

from microserve.protocol import log
from microserve.protocol.errors import InvalidInterval, InvalidRequest, TransferFailed, UnsupportedAction
from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.engine_info import ABILITIES, PREP_RECV, REMOTE_SEND
from microserve.protocol.messages.kv.geometry import Geometry
from microserve.protocol.messages.request.sampling import Grammar
from microserve.services.links.stream import Tokens
from microserve.services.router.authoring.mesh import Mesh
from microserve.services.router.request.request import Request
from tests.support.router.paper_mesh import PaperEngine, paper_mesh
from tests.support.router.router_world import expected_output, in_loop, router_world, serve_with

PROMPT = list(range(100))
GEOMETRY = Geometry("bfloat16", "rows", 16, 30, 3, 64)


def paper(engine_id: str, can: list[str] | None, labels: list[str] | None = None, **said: Any) -> PaperEngine:
    return PaperEngine(engine_id, labels=labels or [], said={"can": can, **said})


def picked(*engines: PaperEngine, label: str | None, seeds: int = 8, **how: Any) -> set[str]:
    """Whom a pick may choose."""
    chosen = set()
    for seed in range(seeds):
        with paper_mesh(*engines, seed=seed) as (mesh, request):
            chosen.add(mesh.pick(label, request, **how).id)
    return chosen


PLAIN, WHOLE, OLDER = paper("plain", []), paper("whole", [*ABILITIES]), paper("older", None)


def test_a_pick_for_a_transfer_offers_engines_that_can() -> None:
    for label in ("prefill", "decode"):
        assert picked(PLAIN, WHOLE, OLDER, label=label) == {"whole", "older"}
    assert picked(PLAIN, WHOLE, OLDER, label=None, seeds=40) == {"plain", "whole", "older"}
    assert picked(PLAIN, WHOLE, OLDER, label=None, can=[PREP_RECV, REMOTE_SEND]) == {"whole", "older"}
    assert picked(PLAIN, WHOLE, label="decode", can=(), seeds=40) == {"plain", "whole"}


def test_what_it_can_comes_before_its_label() -> None:
    labelled = paper("labelled", [], ["prefill"])
    other = paper("other", [REMOTE_SEND], ["decode"])

    assert picked(labelled, other, label="prefill") == {"other"}


def test_where_nobody_can_a_label_offers_all_and_can_nobody() -> None:
    assert picked(PLAIN, label="decode") == {"plain"}
    with paper_mesh(PLAIN) as (mesh, request), pytest.raises(UnsupportedAction, match="prep_recv"):
        mesh.pick("decode", request, can=[PREP_RECV])


def test_a_request_goes_to_engines_that_have_what_it_needs() -> None:
    guided = Grammar(kind="regex", text="a+")
    with paper_mesh(PLAIN, WHOLE) as (mesh, request):
        mesh._scope.sampling = msgspec.structs.replace(request.sampling, grammar=guided)
        assert {mesh.pick(None, request).id for _ in range(20)} == {"whole"}
    with paper_mesh(PLAIN) as (mesh, request):
        mesh._scope.sampling = msgspec.structs.replace(request.sampling, prompt_logprobs=1)
        with pytest.raises(InvalidRequest) as refused:
            mesh.pick(None, request)
        assert refused.value.field == "prompt_logprobs"


@pytest.mark.parametrize(
    ("here", "there", "keeps"),
    [
        ({}, {}, True),
        ({"can": [PREP_RECV]}, {"can": [REMOTE_SEND]}, True),
        ({"can": [REMOTE_SEND]}, {}, False),
        ({}, {"can": [PREP_RECV]}, False),
        ({"geometry": GEOMETRY}, {"geometry": GEOMETRY}, True),
        ({"geometry": GEOMETRY}, {"geometry": msgspec.structs.replace(GEOMETRY, dtype="float32")}, False),
    ],
)
def test_kv_is_kept_where_it_fits(here: dict[str, Any], there: dict[str, Any], keeps: bool) -> None:
    engines = [PaperEngine("a", said=here), PaperEngine("b", said=there)]
    with paper_mesh(*engines) as (mesh, _):
        a, b = mesh.engines()
        assert a.keeps_kv_of(b) is keeps


@pytest.mark.parametrize(
    "strategy", ["disaggregated", "balanced", "cache_aware", "migrate", "thirds", "auto"]
)
@in_loop
async def test_strategies_serve_a_mesh_of_two_kinds_of_engines(strategy: str) -> None:
    async with router_world() as world:
        world.add_engine("plain", can=[], backend="vllm-serve")
        for engine_id in ("a", "b"):
            world.add_engine(engine_id, can=[*ABILITIES])
        await world.list_engines()
        for _ in range(4):
            answer = await world.gateway.generate(PROMPT, strategy=strategy)
            assert answer.token_ids == expected_output(4)
            assert not answer.result.alone
        plain = world.engines["plain"]
        assert not (plain.of(wire.PrepRecv) or plain.of(wire.RemoteSend) or plain.of(wire.Commit))


@in_loop
async def test_a_strategy_that_asks_for_what_is_not_there_gets_a_clear_error() -> None:
    errors: list[UnsupportedAction] = []

    async def body(mesh: Mesh, request: Request) -> AsyncGenerator[Tokens, None]:
        [engine] = mesh.engines()
        try:
            await engine.prep_recv(request)
        except UnsupportedAction as error:
            errors.append(error)
        async for tokens in engine.start_generate(request):
            yield tokens

    async with router_world() as world:
        world.add_engine("e", can=[], backend="vllm-serve")
        await world.list_engines()
        answer = await serve_with(world, body, PROMPT)
        assert answer.token_ids == expected_output(4)
        [error] = errors
        assert (error.code, error.detail) == ("unsupported_action", "engine e (vllm-serve) does no prep_recv")
        assert not world.engines["e"].of(wire.PrepRecv)


@in_loop
async def test_a_request_whose_strategy_asks_an_engine_for_too_much_is_served_all_the_same() -> None:
    async with router_world() as world:
        world.add_engine("e", can=[], backend="vllm-serve")
        await world.list_engines()
        with structlog.testing.capture_logs() as logs:
            answer = await world.gateway.generate(PROMPT, strategy="disaggregated")
        assert answer.token_ids == expected_output(4)
        assert answer.result.alone == "unsupported_action"
        [failed] = [line for line in logs if line["event"] == log.STRATEGY_FAILED]
        assert failed["error"] == "engine e (vllm-serve) does no prep_recv"


@in_loop
async def test_kv_of_another_shape_is_refused_before_it_is_asked_for() -> None:
    errors: list[TransferFailed] = []

    async def body(mesh: Mesh, request: Request) -> AsyncGenerator[Tokens, None]:
        a, b = sorted(mesh.engines(), key=lambda engine: engine.id)
        grant = await a.prep_recv(request)
        assert grant.grant is not None
        grant.grant = msgspec.structs.replace(grant.grant, geometry=GEOMETRY)
        try:
            b.remote_send(request, grant)
        except TransferFailed as error:
            errors.append(error)
        await a.release(request, grant)
        async for tokens in a.start_generate(request):
            yield tokens

    async with router_world() as world:
        world.add_engine("a")
        world.add_engine("b", geometry=msgspec.structs.replace(GEOMETRY, dtype="float32"), can=None)
        await world.list_engines()
        answer = await serve_with(world, body, PROMPT)
        assert answer.token_ids == expected_output(4)
        assert [error.detail for error in errors] == [
            "KV of these engines differs: dtype: float32 at b, bfloat16 at a"
        ]
        assert not world.engines["b"].of(wire.RemoteSend)


@pytest.mark.parametrize(("begin", "end", "field"), [(0, 40, "end"), (40, 96, "begin"), (48, 96, None)])
@in_loop
async def test_a_split_that_the_sender_cannot_make_is_refused_and_not_moved(
    begin: int, end: int, field: str | None
) -> None:
    refused: list[str | None] = []

    async def body(mesh: Mesh, request: Request) -> AsyncGenerator[Tokens, None]:
        a, b = sorted(mesh.engines(), key=lambda engine: engine.id)
        assert [b.split_at(position) for position in (0, 15, 16, 47, 48)] == [0, 0, 16, 32, 48]
        grant = await a.prep_recv(request, end=96)
        try:
            sending = b.remote_send(request, grant, begin=begin, end=end)
        except InvalidInterval as error:
            refused.append(error.field)
        else:
            await sending
        a.abort(request)
        async for tokens in b.start_generate(request):
            yield tokens

    async with router_world() as world:
        world.add_engine("a")
        world.add_engine("b", split_tokens=16)
        await world.list_engines()
        answer = await serve_with(world, body, PROMPT)
        assert answer.token_ids == expected_output(4)
        assert refused == ([field] if field else [])
        assert len(world.engines["b"].of(wire.RemoteSend)) == (0 if field else 1)


@pytest.mark.parametrize(("sender", "receiver"), [(True, True), (False, True), (True, False), (False, False)])
@in_loop
async def test_the_sender_samples_the_first_token_where_both_can(sender: bool, receiver: bool) -> None:
    without = [each for each in ABILITIES if each != "first_token"]
    async with router_world(labels={}) as world:
        told = {True: [*ABILITIES], False: without}
        world.add_engine("d", labels=["decode"], can=told[receiver], recompute_tokens=1)
        world.add_engine("p", labels=["prefill"], can=told[sender])
        await world.list_engines()
        answer = await world.gateway.generate(PROMPT, strategy="disaggregated")
        assert answer.token_ids == expected_output(4)
        [sent] = world.engines["p"].of(wire.RemoteSend)
        [start] = world.engines["d"].of(wire.StartGenerate)
        assert start.await_first is (sent.sampling is not None) is (sender and receiver)


@in_loop
async def test_the_line_of_a_request_says_through_what_its_kv_went() -> None:
    async with router_world("a", "b") as world:
        with structlog.testing.capture_logs() as logs:
            split = await world.gateway.generate(PROMPT, strategy="disaggregated")
            alone = await world.gateway.generate(PROMPT, strategy="data_parallel")
        assert (split.result.heaps, alone.result.heaps) == (["shm"], [])
        lines = [line["heaps"] for line in logs if line["event"] == log.REQUEST_FINISHED]
        assert lines == [["shm"], []]
