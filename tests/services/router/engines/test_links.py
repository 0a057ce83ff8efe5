"""What the router knows of transfers: goodput as senders measured it, and what is still on its way."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.engine import EngineLoad, LinkGoodput
from microserve.services.router.engines.load import Links, LoadBook
from tests.support.router.paper_mesh import PaperEngine, by_id, paper_mesh, sent
from tests.support.router.router_world import eventually, in_loop, router_world

sends = st.tuples(st.integers(1, 10_000), st.floats(1e-6, 1e3))


@given(st.lists(sends, min_size=1, max_size=20))
def test_goodput_lies_between_the_slowest_and_the_fastest_send(measured: list[tuple[int, float]]) -> None:
    links = Links()
    for num_tokens, seconds in measured:
        links.measure("p", "d", sent(num_tokens, nbytes=64 * num_tokens, transfer_s=seconds))
    rates = [64 * num_tokens / seconds for num_tokens, seconds in measured]
    assert min(rates) * 0.999 <= links.goodput("p", "d") <= max(rates) * 1.001
    assert links.kv_nbytes_per_token == pytest.approx(64)
    assert links.goodput("d", "p") == 0.0


def test_a_large_send_counts_for_more_than_small_ones() -> None:
    links = Links()
    links.measure("p", "d", sent(1000, nbytes=1_000_000, transfer_s=1.0))
    for _ in range(3):  # a fixed cost of 10 ms each
        links.measure("p", "d", sent(1, nbytes=1000, transfer_s=0.011))
    assert links.goodput("p", "d") > 900_000


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf])
def test_a_time_that_is_none_measures_nothing(seconds: float) -> None:
    links = Links()
    links.measure("p", "d", sent(10, nbytes=640, transfer_s=seconds))
    assert links.goodput("p", "d") == 0.0
    assert links.kv_nbytes_per_token == 64
    links.measure("p", "d", sent(0, nbytes=0, transfer_s=1.0))
    assert links.kv_nbytes_per_token == 64


def test_a_transfer_is_predicted_from_its_link() -> None:
    book = LoadBook()
    with paper_mesh(PaperEngine("p"), PaperEngine("d"), book=book) as (mesh, _):
        p, d = by_id(mesh)["p"], by_id(mesh)["d"]
        assert mesh.transfer_s(p, d, 1000) == 0.0
        book.links.measure("p", "d", sent(10, nbytes=640, transfer_s=0.01))
        assert mesh.link(p, d) == pytest.approx(64_000)
        assert mesh.transfer_s(p, d, 1000) == pytest.approx(1.0)
        assert mesh.transfer_s(d, p, 1000) == 0.0


def test_until_a_router_has_sent_anything_itself_it_takes_the_senders_word_for_a_link() -> None:
    book = LoadBook()
    told = EngineLoad(links=[LinkGoodput("d", 1e6)])
    with paper_mesh(PaperEngine("p", told), PaperEngine("d"), book=book) as (mesh, _):
        p, d = by_id(mesh)["p"], by_id(mesh)["d"]
        assert (mesh.link(p, d), mesh.link(d, p)) == (1e6, 0.0)
        book.links.measure("p", "d", sent(10, nbytes=640, transfer_s=0.01))
        assert mesh.link(p, d) == pytest.approx(64_000)


@in_loop
async def test_the_backlog_is_at_both_ends_while_it_lasts_and_the_link_is_known_after_it() -> None:
    async with router_world("d", "p", labels={"d": ["decode"], "p": ["prefill"]}) as world:
        book = world.router.serving.book
        d, p = world.engines["d"], world.engines["p"]
        p.paused.add("RemoteSend")
        answer = world.gateway.start(list(range(50)), strategy="disaggregated")
        await p.saw(wire.RemoteSend)
        for engine in ("d", "p"):
            assert book.load(engine, EngineLoad()).transfer_tokens == 50
        book.check_integrity()
        p.resume("RemoteSend")
        await answer.wait()
        for engine in ("d", "p"):
            assert book.load(engine, EngineLoad()).transfer_tokens == 0
        assert book.links.goodput("p", "d") == pytest.approx(50 * 64 / 0.001)
        assert book.links.goodput("d", "p") == 0.0
        d.die()
        await eventually(lambda: len(world.router.registry.joined()) == 1, "d is lost")
        assert book.links.goodput("p", "d") == 0.0


@in_loop
async def test_a_send_that_fails_or_is_cancelled_leaves_no_backlog() -> None:
    async with router_world("d", "p", labels={"d": ["decode"], "p": ["prefill"]}) as world:
        book = world.router.serving.book
        p = world.engines["p"]
        p.paused.add("RemoteSend")
        answer = world.gateway.start(list(range(50)), strategy="disaggregated")
        await p.saw(wire.RemoteSend)
        world.gateway.cancel(answer)
        await answer.wait()
        assert book.is_zero
        p.resume("RemoteSend")
        await world.check_clean()
        assert book.links.goodput("p", "d") == 0.0
