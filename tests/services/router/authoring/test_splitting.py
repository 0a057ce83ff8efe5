"""Where two engines are cheaper than one, by what they have measured: the crossing, on paper."""

from __future__ import annotations

from typing import Any

import pytest

from microserve.protocol.messages.engine import EngineLoad
from microserve.services.router.authoring.splitting import Split, alone_s, cheapest_split
from microserve.services.router.engines.load import LoadBook
from tests.support.router.paper_mesh import PaperEngine, paper_mesh, sent

GPU: dict[str, Any] = {"prefill_tokens_per_s": 30_000.0, "decode_step_s": 0.006, "mean_output_tokens": 100.0}
CPU: dict[str, Any] = {"prefill_tokens_per_s": 500.0, "decode_step_s": 0.015, "mean_output_tokens": 20.0}
BATCH: dict[str, Any] = {"max_num_batched_tokens": 512, "max_num_seqs": 64}


def engine(engine_id: str, rates: dict[str, Any], **load: Any) -> PaperEngine:
    return PaperEngine(engine_id, EngineLoad(**{**rates, **BATCH, **load}))


def saving(*engines: PaperEngine, num_tokens: int, link: float = 5e9) -> tuple[Split, float]:
    """The split, and what it saves of the cost on the best engine alone; a link in bytes a second."""
    book = LoadBook()
    for source in engines:
        for target in engines:
            book.links.measure(
                source.engine_id, target.engine_id, sent(1000, nbytes=10**8, transfer_s=10**8 / link)
            )
    with paper_mesh(*engines, num_tokens=num_tokens, book=book) as (mesh, request):
        split = cheapest_split(mesh, request)
        alone = min(alone_s(mesh, request, each) for each in mesh.engines())
        return split, 1 - split.cost_s / alone


def test_two_idle_engines_halve_a_prefill_that_is_most_of_a_request() -> None:
    split, saved = saving(engine("a", CPU), engine("b", CPU), num_tokens=600)
    assert split.end == 300
    assert saved > 0.3
    _, saved = saving(engine("a", GPU), engine("b", GPU), num_tokens=600)
    assert 0.0 < saved < 0.05, "decoding is nearly all of it there"


def test_what_an_idle_engine_computes_meanwhile_is_one_step() -> None:
    _, short = saving(engine("a", CPU), engine("b", CPU), num_tokens=1000)
    _, long = saving(engine("a", CPU), engine("b", CPU), num_tokens=8000)
    assert long < short / 4


def test_prefills_keep_away_from_decodes_where_those_are_long() -> None:
    p, d = engine("p", GPU, prefill_share=0.6), engine("d", GPU, num_running=8)
    split, saved = saving(p, d, num_tokens=3000)
    assert (split.prefill.id, split.decode.id, split.end) == ("p", "d", 3000)
    assert saved > 0.2


def test_a_long_queue_at_the_prefill_engine_ends_it() -> None:
    p = engine("p", GPU, prefill_share=0.8, queued_prefill_tokens=30_000)
    _, saved = saving(p, engine("d", GPU, num_running=8, prefill_share=0.1), num_tokens=3000)
    assert saved <= 0.0


@pytest.mark.parametrize("rates", [CPU, GPU])
def test_a_slow_link_ends_it(rates: dict[str, Any]) -> None:
    engines = engine("p", rates, prefill_share=0.5), engine("d", rates, num_running=8)
    _, saved = saving(*engines, num_tokens=3000, link=1e7)
    assert saved < 0.0


def test_a_link_that_nobody_has_measured_is_tried_by_one_send() -> None:
    engines = engine("p", GPU, prefill_share=0.5), engine("d", GPU, num_running=8)
    for in_flight, is_tried in ((0, True), (100, False)):
        book = LoadBook()
        if in_flight:
            book.open().begin_transfer("s", "p", "d", in_flight)
        with paper_mesh(*engines, num_tokens=3000, book=book) as (mesh, request):
            assert (cheapest_split(mesh, request).cost_s < float("inf")) is is_tried


def test_one_engine_alone_has_no_split() -> None:
    _, saved = saving(engine("a", CPU), num_tokens=600)
    assert saved == float("-inf")


def test_who_comes_in_a_crowd_is_not_all_sent_to_the_engine_whose_step_looks_shortest() -> None:
    """Nothing that an engine says has changed since the first of them came."""
    a, b = engine("a", CPU), engine("b", {**CPU, "decode_step_s": 0.014})
    book = LoadBook()
    for source, target in (("a", "b"), ("b", "a")):
        book.links.measure(source, target, sent(1000, nbytes=10**8, transfer_s=0.02))
    placed = []
    for _ in range(8):
        with paper_mesh(a, b, num_tokens=128, book=book) as (mesh, request):
            split = cheapest_split(mesh, request)
            one = min(mesh.engines(), key=lambda each: alone_s(mesh, request, each))
            alone = alone_s(mesh, request, one)
        placed.append(split.decode.id if split.cost_s < alone else one.id)
        account = book.open()
        account.reserve_sequence(placed[-1])
    assert sorted(placed) == ["a"] * 4 + ["b"] * 4
