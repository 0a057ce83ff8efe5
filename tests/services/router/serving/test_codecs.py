"""KV that goes by a codec, as a router sees it: who may lose, what it promises, and what it tells of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec
import pytest
import structlog

from microserve.protocol import log
from microserve.protocol.errors import StrategyError
from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.kv.coding import Coding
from microserve.protocol.messages.numerics import Numerics
from microserve.protocol.metrics.readings import Readings
from microserve.protocol.metrics.table import router as table
from microserve.services.router.authoring.action.generating import Chunks
from microserve.services.router.authoring.mesh import Mesh
from microserve.services.router.request.request import Request
from microserve.services.router.serving.tally import MAX_CODINGS, RouterTally
from tests.support.router.router_world import World, expected_output, in_loop, router_world, serve_with

PROMPT = list(range(100))
EXACT = Numerics("a", is_exact=True)
LOSSY = Coding("p8", 6400, 800, 0.01, 0.5, 0.6, 1e6, is_lossy=True, reason="model")
LOSSLESS = Coding("lossless-zstd", 6400, 5000, 0.01, 0.5, 0.6, 1e6, is_lossy=False, reason="explored")
LABELS = {"d": ["decode"], "p": ["prefill"]}


def strategy(
    codec: str, prep: bool | None, send: bool | None = None, within_s: float = 0.0
) -> Callable[[Mesh, Request], Chunks]:
    async def split(mesh: Mesh, request: Request) -> Chunks:
        decode, prefill = mesh.pick("decode", request), mesh.pick("prefill", request)
        grant = await decode.prep_recv(request, end=90, lossy=prep)
        sending = prefill.remote_send(request, grant, end=90, codec=codec, lossy=send, within_s=within_s)
        yield decode.start_generate(request, begin=90, after=sending)

    return split


async def served(world: World, exact: bool | None, *said: object) -> tuple[wire.PrepRecv, wire.RemoteSend]:
    answer = await serve_with(world, strategy(*said), PROMPT, exact=exact)  # type: ignore[arg-type]
    assert answer.token_ids == expected_output(4), answer.result
    return world.engines["d"].of(wire.PrepRecv)[-1], world.engines["p"].of(wire.RemoteSend)[-1]


@pytest.mark.parametrize(
    ("exact", "prep", "send", "may"),
    [
        (None, None, None, False),
        (None, True, None, True),
        (None, True, True, True),
        (None, True, False, False),
        (None, False, None, False),
        (True, True, True, False),
        (True, None, None, False),
        (False, None, None, True),
        (False, True, None, True),
        (False, False, None, False),
        (False, None, False, False),
    ],
)
@in_loop
async def test_who_may_lose(exact: bool | None, prep: bool | None, send: bool | None, may: bool) -> None:
    """The client first, with its key; then the strategy; who says nothing is exact."""
    async with router_world("d", "p", labels=LABELS) as world:
        asked, sent = await served(world, exact, "auto", prep, send)
        assert (sent.codec, sent.may_lose) == ("auto", may)
        assert asked.may_lose is (may or (send is False and (exact is False or prep is True)))


@in_loop
async def test_without_a_codec_nothing_may_lose() -> None:
    async with router_world("d", "p", labels=LABELS) as world:
        asked, sent = await served(world, False, "", True, None)
        assert (asked.may_lose, sent.codec, sent.may_lose) == (True, "", False)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (("auto", None, True), "the grant may lose nothing"),
        (("x" * 97, True, None), "codec has 97 characters"),
        (("auto", True, None, -1.0), "within_s is -1.0"),
        (("auto", True, None, float("nan")), "within_s is nan"),
    ],
)
@in_loop
async def test_a_strategys_mistake_is_its_own(said: tuple[object, ...], words: str) -> None:
    errors: list[StrategyError] = []

    async def body(mesh: Mesh, request: Request) -> Chunks:
        try:
            async for chunk in strategy(*said)(mesh, request):  # type: ignore[arg-type]
                yield chunk
        except StrategyError as error:
            errors.append(error)
            raise

    async with router_world("d", "p", labels=LABELS) as world:
        await serve_with(world, body, PROMPT)
    assert words in errors[0].detail


@pytest.mark.parametrize(
    ("coding", "exact", "promise"),
    [(LOSSY, False, "none"), (LOSSLESS, False, "a"), (LOSSLESS, True, "a"), (None, False, "a")],
)
@in_loop
async def test_an_answer_of_kv_that_lost_something_promises_nothing(
    coding: Coding | None, exact: bool, promise: str
) -> None:
    async with router_world(labels={}) as world:
        for engine_id, labels in LABELS.items():
            world.add_engine(engine_id, labels=labels, numerics=EXACT)
        world.engines["p"].coding = coding
        await world.list_engines()
        answer = await serve_with(world, strategy("auto", None), PROMPT, exact=exact)
        assert answer.result.numerics.promise == promise
        assert all(told.promise == promise for told in answer.numerics)


@in_loop
async def test_what_is_not_known_yet_is_not_promised() -> None:
    """The decode engine has its KV and begins; the sender's answer is still on its way."""
    async with router_world(labels={}) as world:
        for engine_id, labels in LABELS.items():
            world.add_engine(engine_id, labels=labels, numerics=EXACT)
        sender, decode = world.engines["p"], world.engines["d"]
        sender.paused.add("RemoteSend")
        decode.manual = True
        await world.list_engines()
        task = asyncio.create_task(serve_with(world, strategy("auto", True), PROMPT, request_id="r"))
        await decode.saw(wire.StartGenerate)
        await sender.saw(wire.RemoteSend)
        decode.emit(wire.Delta("r", 0, expected_output(2)))
        decode.finish("r", 2)
        answer = await task
        assert answer.result.numerics.promise == "none"


@in_loop
async def test_the_line_the_record_and_the_metrics_tell_of_it() -> None:
    async with router_world("d", "p", labels=LABELS) as world:
        world.engines["p"].coding = LOSSY
        with structlog.testing.capture_logs() as logs:
            await serve_with(world, strategy("auto", True), PROMPT, request_id="client.0a0a0a0a-0")
            await world.gateway.generate(PROMPT, strategy="disaggregated")
        coded, plain = [line["codings"] for line in logs if line["event"] == log.REQUEST_FINISHED]
        assert plain == []
        assert coded == [
            {
                "source": "p",
                "target": "d",
                "profile": "p8",
                "reason": "model",
                "raw_bytes": 6400,
                "wire_bytes": 800,
                "encode_s": 0.01,
                "predicted_s": 0.5,
                "observed_s": 0.6,
                "link_bytes_per_s": 1_000_000,
            }
        ]
        [found], _ = world.router.serving.explain("client")
        assert [send.coding for send in found.attempts[0].sends] == [LOSSY]
        assert series(world.router.serving.tally)[("p8", "model")] == 1


def series(tally: RouterTally) -> dict[tuple[str, ...], object]:
    readings = Readings()
    tally.read(readings)
    families = (table.CODINGS, table.CODED_NBYTES)
    return {labels: value for each, found in readings if each in families for labels, value in found}


def test_profiles_are_counted_and_have_an_end() -> None:
    tally = RouterTally()
    tally.coded([LOSSY, LOSSLESS, LOSSLESS])
    assert series(tally) == {
        ("p8", "model"): 1,
        ("lossless-zstd", "explored"): 2,
        ("raw",): 19_200,
        ("wire",): 10_800,
    }
    for number in range(2 * MAX_CODINGS):
        tally.coded([msgspec.structs.replace(LOSSY, profile=f"p{number}")])
    assert len(series(tally)) <= MAX_CODINGS + 3
    assert sum(count for key, count in series(tally).items() if len(key) == 2) == 2 * MAX_CODINGS + 3  # type: ignore[misc]


@pytest.mark.parametrize("name", ["disaggregated", "cache_aware", "conditional"])
@in_loop
async def test_strategies_that_split_take_a_codec(name: str) -> None:
    async with router_world("d", "p", labels=LABELS) as world:
        strategies = world.router.strategies
        strategies.configure({name: {"codec": "auto", "lossy": True}})
        if name == "conditional":
            world.engines["d"].load = msgspec.structs.replace(world.engines["d"].load, free_blocks=1)
        await world.list_engines()
        await world.gateway.generate(PROMPT, strategy=name)
        [sent] = world.engines["p"].of(wire.RemoteSend)
        assert (sent.codec, sent.may_lose) == ("auto", True)
