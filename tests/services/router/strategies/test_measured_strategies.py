"""What the strategies decide that go by measurement: which engine, which split, when to refuse."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.engine import EngineLoad
from microserve.services.router.authoring.splitting import even_split
from microserve.services.router.engines.load import LoadBook
from tests.support.router.paper_mesh import PaperEngine, by_id, paper_mesh, sent
from tests.support.router.router_world import World, eventually, expected_output, in_loop, router_world

PD = {"d": ["decode"], "p": ["prefill"]}


async def report(world: World, engine_id: str, **fields: Any) -> None:
    """Let the router hear this of an engine."""
    world.engines[engine_id].load = load = EngineLoad(**fields)
    [connection] = [c for c in world.router.registry.joined() if c.engine_id == engine_id]
    await eventually(lambda: connection.load == load, "heartbeat")


async def stored(world: World, prompt: list[int], **num_tokens: int) -> None:
    """Engines that hold so many tokens of a prompt."""
    for engine_id, count in num_tokens.items():
        world.engines[engine_id].store(prompt[:count])
    index = world.router.prefixes.index
    await eventually(lambda: index and index.lookup(prompt) == num_tokens, "events came")


async def engines_of(world: World, prompt: list[int], strategy: str) -> list[str]:
    answer = await world.gateway.generate(prompt, strategy=strategy)
    assert answer.token_ids == expected_output(4), answer.result
    return answer.result.engines


def intervals(world: World) -> list[tuple[str, int, int]]:
    """Engine, begin and end of all sends."""
    return [(e.engine_id, c.begin, c.end) for e in world.engines.values() for c in e.of(wire.RemoteSend)]


# --- token_aware ----------------------------------------------------------------------------------


@in_loop
async def test_token_aware_leaves_a_warm_engine_when_its_queue_takes_too_long() -> None:
    async with router_world("a", "b", strategies={"token_aware": {"penalty_s": 2.0}}) as world:
        prompt = list(range(100))
        await stored(world, prompt, b=96)
        await report(world, "b", queued_prefill_tokens=1900, prefill_tokens_per_s=1000.0)
        assert await engines_of(world, prompt, "token_aware") == ["b"]
        await report(world, "b", queued_prefill_tokens=2100, prefill_tokens_per_s=1000.0)
        assert await engines_of(world, prompt, "token_aware") == ["a"]
        await report(world, "b", queued_prefill_tokens=2100)  # nobody knows how long that takes
        assert await engines_of(world, prompt, "token_aware") == ["b"]


@in_loop
async def test_token_aware_counts_tokens_where_nobody_is_warm() -> None:
    async with router_world("a", "b") as world:
        prompt = list(range(100))
        await stored(world, prompt, b=48)
        await report(world, "b", queued_prefill_tokens=40)
        assert await engines_of(world, prompt, "token_aware") == ["b"]
        await report(world, "b", queued_prefill_tokens=60)
        assert await engines_of(world, prompt, "token_aware") == ["a"]


# --- kv_cost --------------------------------------------------------------------------------------


@in_loop
async def test_kv_cost_weighs_saved_prefill_against_blocks_in_use() -> None:
    """96 of 96 tokens are 6 blocks saved; credit 2 counts them as 6 (a credit cannot save more than all)."""
    async with router_world("a", "b") as world:
        prompt = list(range(96))
        await stored(world, prompt, b=96)
        await report(world, "a", free_blocks=1000)
        await report(world, "b", free_blocks=995)
        assert await engines_of(world, prompt, "kv_cost") == ["b"]
        await report(world, "b", free_blocks=993)
        assert await engines_of(world, prompt, "kv_cost") == ["a"]
        await report(world, "b", free_blocks=993, queued_prefill_tokens=160)
        await report(world, "a", free_blocks=1000, queued_prefill_tokens=160)
        assert await engines_of(world, prompt, "kv_cost") == ["a"]
        world.router.strategies.configure({"kv_cost": {"credit": 2.0}})
        assert await engines_of(world, prompt, "kv_cost") == ["b"]
        world.router.strategies.configure({"kv_cost": {"request_weight": 6.0}})
        await report(world, "b", free_blocks=993, queued_prefill_tokens=160, num_running=1)
        assert await engines_of(world, prompt, "kv_cost") == ["a"]


# --- min_ttft -------------------------------------------------------------------------------------

FAST = {"prefill_tokens_per_s": 1000.0, "free_blocks": 1000}


@in_loop
async def test_min_ttft_takes_the_engine_that_is_soonest_and_not_the_emptiest() -> None:
    async with router_world("a", "b") as world:
        await report(world, "a", **{**FAST, "prefill_tokens_per_s": 100.0})
        await report(world, "b", **FAST, queued_prefill_tokens=100, num_waiting=1)
        assert await engines_of(world, list(range(100)), "min_ttft") == ["b"]


@in_loop
async def test_min_ttft_fetches_a_prefix_from_a_busy_holder() -> None:
    async with router_world("a", "b") as world:
        prompt = list(range(100))
        await stored(world, prompt, b=96)
        await report(world, "a", **FAST)
        await report(world, "b", **FAST, queued_prefill_tokens=500, num_waiting=1)
        assert await engines_of(world, prompt, "min_ttft") == ["a", "b"]
        assert intervals(world) == [("b", 0, 96)]
        assert len(world.engines["a"].of(wire.Commit)) == 1


@in_loop
async def test_min_ttft_computes_what_would_take_longer_to_fetch() -> None:
    async with router_world("a", "b") as world:
        prompt = list(range(100))
        await stored(world, prompt, b=96)
        await report(world, "a", **FAST)
        await report(world, "b", **FAST, queued_prefill_tokens=500, num_waiting=1)
        links = world.router.serving.book.links
        links.measure("b", "a", sent(100, nbytes=6400, transfer_s=0.3))
        assert await engines_of(world, prompt, "min_ttft") == ["a", "b"]  # 0.29 s and 4 tokens, 0.5 s at b
        links.measure("b", "a", sent(100_000, nbytes=6_400_000, transfer_s=3000.0))
        world.forget_calls()
        assert await engines_of(world, prompt, "min_ttft") == ["b"]  # the fetch would take seconds
        assert intervals(world) == []


@in_loop
async def test_min_ttft_refuses_what_comes_too_late_and_says_when_to_ask_again() -> None:
    async with router_world("a", "b", strategies={"min_ttft": {"slo_s": 1.0}}) as world:
        for engine_id in ("a", "b"):
            await report(world, engine_id, **FAST, queued_prefill_tokens=3000, num_waiting=1)
        refused = (await world.gateway.generate(list(range(500)), strategy="min_ttft")).result
        assert (refused.reason, refused.code) == ("error", "queue_full")
        assert refused.retry_after_s == pytest.approx(2.5)
        assert world.calls() == []
        await report(world, "a", **FAST, queued_prefill_tokens=300, num_waiting=1)
        assert await engines_of(world, list(range(500)), "min_ttft") == ["a"]


@in_loop
async def test_min_ttft_decodes_where_the_labels_say() -> None:
    async with router_world("d", "p", labels=PD) as world:
        assert await engines_of(world, list(range(100)), "min_ttft") == ["d", "p"]
        assert intervals(world) == [("p", 0, 100)]


# --- conditional ----------------------------------------------------------------------------------

CONDITIONAL = {"max_tokens": 60, "prefill_busy": 500}


@pytest.mark.parametrize(
    ("policy", "cached", "busy", "is_remote"),
    [
        ("isl_bounding", 0, 0, True),  # nothing is cached
        ("isl_bounding", 48, 0, False),  # 52 of 100 tokens
        ("isl_bounding", 32, 0, True),  # 68 are too many
        ("isl_bounding", 0, 900, True),
        ("prefill_load", 48, 0, True),
        ("prefill_load", 0, 900, False),
        ("isl_or_load", 0, 0, True),
        ("isl_or_load", 48, 0, False),
        ("isl_or_load", 0, 900, False),
    ],
)
def test_conditional(policy: str, cached: int, busy: int, is_remote: bool) -> None:
    @in_loop
    async def main() -> None:
        settings = {"conditional": {**CONDITIONAL, "policy": policy}}
        async with router_world("d", "p", labels=PD, strategies=settings) as world:
            prompt = list(range(100))
            if cached:
                await stored(world, prompt, d=cached)
            await report(world, "d", free_blocks=500)
            await report(world, "p", queued_prefill_tokens=busy)
            assert await engines_of(world, prompt, "conditional") == ["d", "p"][: 1 + is_remote]
            # A decode engine that is nearly full prefills nothing.
            await report(world, "d", free_blocks=99)
            assert await engines_of(world, prompt, "conditional") == ["d", "p"]

    main()


# --- balanced_adaptive ----------------------------------------------------------------------------

tokens = st.integers(0, 5000)
rates = st.floats(10.0, 1e6)


@given(
    num_tokens=st.integers(1, 5000),
    held=st.tuples(st.integers(0, 300), st.integers(0, 300)),
    queued=st.tuples(tokens, tokens),
    rate=st.tuples(rates, rates),
    running=st.integers(0, 12),
    reserve=st.floats(0.0, 0.9),
    link=st.none() | st.floats(1e3, 1e9),
)
def test_both_shares_end_together(
    num_tokens: int,
    held: tuple[int, int],
    queued: tuple[int, int],
    rate: tuple[float, float],
    running: int,
    reserve: float,
    link: float | None,
) -> None:
    matched, cached = (min(16 * blocks, num_tokens) for blocks in held)
    p = PaperEngine("p", EngineLoad(queued_prefill_tokens=queued[0], prefill_tokens_per_s=rate[0]))
    d = PaperEngine(
        "d",
        EngineLoad(
            queued_prefill_tokens=queued[1],
            prefill_tokens_per_s=rate[1],
            num_running=running,
            max_num_seqs=8,
        ),
    )
    book = LoadBook()
    if link is not None:
        book.links.measure("p", "d", sent(1000, nbytes=64_000, transfer_s=64_000 / link))
    with paper_mesh(p, d, num_tokens=num_tokens, held={"d": matched, "p": cached}, book=book) as (
        mesh,
        request,
    ):
        engines = by_id(mesh)
        split = even_split(mesh, request, engines["p"], engines["d"], reserve)
    d_rate = rate[1] * (1 - reserve * min(1.0, running / 8))

    def p_ends(at: int) -> float:
        computed = (queued[0] + max(0, at - cached)) / rate[0]
        return max(computed, (at - matched) * 64 / link if link else 0.0)

    def d_ends(at: int) -> float:
        return (queued[1] + num_tokens - at) / d_rate

    assert matched <= split <= num_tokens
    if split < num_tokens:
        assert p_ends(split) >= d_ends(split) * (1 - 1e-9)
    if split > matched:
        assert p_ends(split - 1) <= d_ends(split - 1) * (1 + 1e-9)


def split_of(*engines: PaperEngine, num_tokens: int = 1000, **held: int) -> int:
    with paper_mesh(*engines, num_tokens=num_tokens, held=held) as (mesh, request):
        return even_split(mesh, request, by_id(mesh)["p"], by_id(mesh)["d"], 0.5)


def engine(engine_id: str, **load: Any) -> PaperEngine:
    return PaperEngine(engine_id, EngineLoad(max_num_seqs=8, **load))


def test_splits_as_one_would_make_them_by_hand() -> None:
    fast = {"prefill_tokens_per_s": 1000.0}
    p, d = engine("p", **fast), engine("d", **fast)
    assert split_of(engine("p"), engine("d")) == 500, "nothing is known: half and half"
    assert split_of(p, engine("d")) == 500, "an unknown engine is like the known one"
    assert split_of(p, d) == 500
    assert split_of(p, d, d=400) == 500, "d holds 400, but p must compute them too"
    assert split_of(p, d, p=400) == 700, "p holds 400, and sends them for nothing"
    assert split_of(p, d, p=400, d=400) == 700, "300 for each"
    assert split_of(engine("p", prefill_tokens_per_s=3000.0), d) == 750
    assert split_of(p, engine("d", **fast, queued_prefill_tokens=600)) == 800
    assert split_of(p, engine("d", **fast, queued_prefill_tokens=5000)) == 1000, "all of it"
    assert split_of(engine("p", **fast, queued_prefill_tokens=5000), d) == 0, "none of it"
    assert split_of(p, engine("d", **fast, num_running=8)) == 667, "a full batch halves what d can do"


@in_loop
async def test_balanced_adaptive_sends_its_share_and_the_decode_engine_computes_the_rest() -> None:
    async with router_world("d", "p", labels=PD) as world:
        prompt = list(range(400))
        assert await engines_of(world, prompt, "balanced_adaptive") == ["d", "p"]
        assert intervals(world) == [("p", 0, 200)]
        [call] = world.engines["d"].of(wire.StartGenerate)
        assert call.begin == 200
        world.forget_calls()
        await report(world, "d", queued_prefill_tokens=10_000)
        assert await engines_of(world, prompt, "balanced_adaptive") == ["d", "p"]
        assert intervals(world) == [("p", 0, 400)]


@in_loop
async def test_balanced_adaptive_does_not_send_a_trifle() -> None:
    async with router_world("d", "p", labels=PD) as world:
        assert await engines_of(world, list(range(126)), "balanced_adaptive") == ["d"]
        assert await engines_of(world, list(range(128)), "balanced_adaptive") == ["d", "p"]
        await report(world, "p", queued_prefill_tokens=10_000)
        assert await engines_of(world, list(range(400)), "balanced_adaptive") == ["d"]


@in_loop
async def test_balanced_adaptive_does_not_compute_much_to_spare_little() -> None:
    """d holds 192 of 400: p would compute 200 to spare d 8, but with a prefix 120 to spare it 88."""
    async with router_world("d", "p", labels=PD, strategies={"balanced_adaptive": {"min_share": 1}}) as world:
        prompt = list(range(400))
        await stored(world, prompt, d=192)
        assert await engines_of(world, prompt, "balanced_adaptive") == ["d"]
        await stored(world, prompt, d=192, p=160)
        assert await engines_of(world, prompt, "balanced_adaptive") == ["d", "p"]
        assert intervals(world) == [("p", 192, 280)]


# --- replicate_hot --------------------------------------------------------------------------------


@in_loop
async def test_replicate_hot_copies_what_many_requests_begin_with() -> None:
    hot = {"replicate_hot": {"depth": 2, "hot": 3, "period_s": 0.05}}
    async with router_world("a", "b", strategies=hot) as world:
        prefix = list(range(32))
        await stored(world, prefix, a=32)
        b = world.engines["b"]
        while not b.of(wire.PrepRecv):  # a period that ends between two requests forgets half of them
            await asyncio.gather(
                *(engines_of(world, [*prefix, number], "replicate_hot") for number in range(3))
            )
        await b.saw(wire.Commit)
        await eventually(lambda: world.router.serving.book.is_zero, "the copy is made")
        assert intervals(world) == [("a", 0, 32)]
        [call] = b.of(wire.PrepRecv)
        assert call.end == 32


@in_loop
async def test_replicate_hot_leaves_alone_what_is_short_or_rare() -> None:
    hot = {"replicate_hot": {"depth": 2, "hot": 3, "period_s": 0.02}}
    async with router_world("a", "b", strategies=hot) as world:
        await stored(world, list(range(32)), a=32)
        for number in range(6):
            await engines_of(world, list(range(20)), "replicate_hot")  # less than two blocks
            await engines_of(world, [number, *range(40)], "replicate_hot")
        state = world.router.serving.plans.use(world.router.strategies.get("replicate_hot"))
        await eventually(lambda: not state["heat"], "what was counted is forgotten")
        assert intervals(world) == []
