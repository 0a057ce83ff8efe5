"""Each strategy's exact calls and intervals, against engines that check every one of them."""

from __future__ import annotations

import ast
import asyncio
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from microserve.protocol.messages import engine as wire
from microserve.services.router.strategies import BUILT_IN
from tests.support.examples import examples
from tests.support.router.router_world import (
    World,
    eventually,
    expected_output,
    in_loop,
    open_world,
    router_world,
)
from tests.support.router.scripted_engine import BLOCK_SIZE, ScriptedEngine

Call = tuple[Any, ...]
"""(engine, action, begin, end, flag): what a test compares."""

PROPERTY = settings(
    max_examples=examples(60), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


class Mesh:
    """One loop and one world that lives through all examples of a test."""

    def __init__(self, runner: asyncio.Runner, world: World) -> None:
        self.runner = runner
        self.world = world
        self.prompts = 0

    def prompt(self, num_tokens: int) -> list[int]:
        """Never the same beginning twice."""
        self.prompts += 1
        return [self.prompts % 1000, self.prompts // 1000, *range(num_tokens)][:num_tokens]


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    """Engines ``d`` (decode) and ``p`` (prefill)."""
    with asyncio.Runner() as runner:
        world = runner.run(open_world("d", "p", labels={"d": ["decode"], "p": ["prefill"]}))
        yield Mesh(runner, world)
        runner.run(world.stop())


def seen(engine: ScriptedEngine) -> list[Call]:
    calls: list[Call] = []
    for call in engine.calls:
        match call:
            case wire.PrepRecv():
                calls.append((engine.engine_id, "prep", 0, call.end, None))
            case wire.RemoteSend():
                assert call.lane == 0
                sampled = call.sampling is not None
                calls.append((engine.engine_id, "send", call.begin, call.end, sampled))
            case wire.StartGenerate():
                flag = ("grant" if call.grant_id else "alone", call.await_first)
                calls.append((engine.engine_id, "generate", call.begin, None, flag))
            case wire.Commit():
                calls.append((engine.engine_id, "commit", None, None, None))
            case wire.Abort():
                # The stream may end before the sender's answer is in: then nobody knows that it is done.
                assert calls[-1][1] == "send"
            case _:
                raise AssertionError(f"unexpected {call}")
    return calls


def serve(mesh: Mesh, strategy: str, prompt: list[int], matched: int = 0) -> tuple[list[Call], list[Call]]:
    """Serve one request; the calls that engines ``d`` and ``p`` saw, in order."""
    world = mesh.world

    async def main() -> None:
        world.forget_calls()
        for engine in world.engines.values():
            engine.matched = matched
        answer = await world.gateway.generate(prompt, strategy=strategy, max_tokens=3, salt="t")
        assert answer.result.reason == "length", answer.result
        assert answer.token_ids == expected_output(3)
        await world.check_clean()

    mesh.runner.run(main())
    d, p = world.engines["d"], world.engines["p"]
    for engine in (d, p):
        # The prompt travels once to each engine.
        assert engine.with_tokens == [index == 0 for index in range(len(engine.calls))]
        for call in engine.calls:
            assert getattr(call, "ttl_s", 1.0) > 0
            assert getattr(call, "salt", "t") == "t"
    return seen(d), seen(p)


def blocks(num_tokens: int) -> int:
    return num_tokens // BLOCK_SIZE * BLOCK_SIZE


def transfer(n: int, end: int, matched: int) -> tuple[list[Call], list[Call]]:
    """What a prompt of ``n`` tokens costs when KV of ``[0, end)`` goes from ``p`` to ``d``."""
    if end == 0:
        return [("d", "generate", 0, None, ("alone", False))], []
    have = min(matched, blocks(end))
    await_first = end == n and have < end
    decode: list[Call] = [
        ("d", "prep", 0, end, None),
        ("d", "generate", end, None, ("grant", await_first)),
    ]
    return decode, [("p", "send", have, end, end == n)] if have < end else []


lengths = st.integers(1, 200)
matches = st.integers(0, 14).map(lambda count: count * BLOCK_SIZE)


@pytest.mark.parametrize("strategy", ["data_parallel", "token_aware", "kv_cost", "replicate_hot"])
@PROPERTY
@given(n=lengths, matched=matches)
def test_one_engine_alone(mesh: Mesh, strategy: str, n: int, matched: int) -> None:
    d, p = serve(mesh, strategy, mesh.prompt(n), matched)
    assert [call[1:] for call in d + p] == [("generate", 0, None, ("alone", False))]


@pytest.mark.parametrize("strategy", ["disaggregated", "min_ttft", "conditional", "elastic_roles"])
@PROPERTY
@given(n=lengths, matched=matches)
def test_disaggregated(mesh: Mesh, strategy: str, n: int, matched: int) -> None:
    assert serve(mesh, strategy, mesh.prompt(n), matched) == transfer(n, n, matched)


@PROPERTY
@given(n=lengths, matched=matches, ratio=st.sampled_from([0.0, 0.05, 0.1, 0.5, 0.99, 1.0]))
def test_balanced(mesh: Mesh, n: int, matched: int, ratio: float) -> None:
    mesh.world.router.strategies.configure({"balanced": {"ratio": ratio}})
    split = n - int(n * ratio)
    assert serve(mesh, "balanced", mesh.prompt(n), matched) == transfer(n, split, matched)


@PROPERTY
@given(n=lengths, matched=matches)
def test_balanced_adaptive_halves_what_nothing_is_known_of(mesh: Mesh, n: int, matched: int) -> None:
    split = (n + 1) // 2 if n > 126 else 0  # a share of less than 64 tokens stays at home
    assert serve(mesh, "balanced_adaptive", mesh.prompt(n), matched) == transfer(n, split, matched)


@PROPERTY
@given(n=lengths, matched=matches)
def test_cache_aware(mesh: Mesh, n: int, matched: int) -> None:
    assert serve(mesh, "cache_aware", mesh.prompt(n), matched) == transfer(n, blocks(n), matched)


@PROPERTY
@given(n=lengths, matched=matches)
def test_migrate(mesh: Mesh, n: int, matched: int) -> None:
    d, p = serve(mesh, "migrate", mesh.prompt(n), matched)
    target, source = (d, p) if any(call[1] == "generate" for call in d) else (p, d)
    end = blocks(n)
    have = min(matched, end)
    moved: list[Call] = [("prep", 0, end, None), ("commit", None, None, None)] if end else []
    assert [call[1:] for call in target] == [*moved, ("generate", 0, None, ("alone", False))]
    assert [call[1:] for call in source] == ([("send", have, end, False)] if have < end else [])


@PROPERTY
@given(n=lengths, matched=matches)
def test_auto_serves_alone_while_nothing_is_measured(mesh: Mesh, n: int, matched: int) -> None:
    one, other = sorted(serve(mesh, "auto", mesh.prompt(n), matched))
    assert one == []
    assert [call[1:] for call in other] == [("generate", 0, None, ("alone", False))]


@pytest.mark.parametrize("strategy", [item.name for item in BUILT_IN])
@pytest.mark.parametrize("matched", [0, 32, 64])
def test_every_strategy_serves_on_a_mesh_of_one_engine(strategy: str, matched: int) -> None:
    @in_loop
    async def main() -> None:
        async with router_world("only", labels={"only": ["prefill"]}) as world:
            world.engines["only"].matched = matched
            for num_tokens in (5, 64, 100):
                answer = await world.gateway.generate(list(range(num_tokens)), strategy=strategy)
                assert answer.token_ids == expected_output(4)
                assert answer.result.engines == ["only"]

    main()


@in_loop
async def test_cache_aware_goes_to_the_longest_prefix_and_sends_what_is_missing() -> None:
    async with router_world("a", "b", "c") as world:
        prompt = list(range(100))
        world.engines["a"].store(prompt[:32])
        world.engines["b"].store(prompt[:80])
        index = world.router.prefixes.index
        await eventually(lambda: index and index.lookup(prompt) == {"a": 32, "b": 80}, "events came")
        answer = await world.gateway.generate(prompt, strategy="cache_aware")
        assert answer.result.engines[0] == "b"
        assert answer.result.usage.cached_tokens == 80
        sends = [call for engine in world.engines.values() for call in engine.of(wire.RemoteSend)]
        assert [(call.begin, call.end) for call in sends] == [(80, 96)]
        # Whole blocks are all there: no prefill engine at all.
        world.forget_calls()
        answer = await world.gateway.generate(prompt[:80], strategy="cache_aware")
        assert answer.result.engines == ["b"]
        assert world.calls() == [("b", "PrepRecv"), ("b", "StartGenerate")]


@in_loop
async def test_migrate_moves_from_the_engine_that_holds_the_context() -> None:
    async with router_world("a", "b") as world:
        prompt = list(range(70))
        world.engines["b"].store(prompt)
        index = world.router.prefixes.index
        await eventually(lambda: index and index.lookup(prompt) == {"b": 64}, "events came")
        answer = await world.gateway.generate(prompt, strategy="migrate")
        assert answer.result.engines == ["a", "b"]
        assert sorted(world.calls()) == [
            ("a", "Commit"),
            ("a", "PrepRecv"),
            ("a", "StartGenerate"),
            ("b", "RemoteSend"),
        ]


@in_loop
async def test_auto_prefers_a_warm_engine_until_it_is_too_busy() -> None:
    async with router_world("a", "b", strategies={"auto": {"tau": 1000}}) as world:
        prompt = list(range(100))
        world.engines["b"].store(prompt)
        index = world.router.prefixes.index
        await eventually(lambda: index and index.lookup(prompt) == {"b": 96}, "events came")

        async def report(tokens: int) -> None:
            world.engines["b"].load = wire.EngineLoad(queued_prefill_tokens=tokens)
            connection = next(c for c in world.router.registry.joined() if c.engine_id == "b")
            await eventually(lambda: connection.load.queued_prefill_tokens == tokens, "heartbeat")

        await report(900)
        assert (await world.gateway.generate(prompt)).result.engines == ["b"]
        await report(1001)
        assert (await world.gateway.generate(prompt)).result.engines == ["a"]


@in_loop
async def test_auto_takes_two_engines_where_their_rates_say_that_it_pays() -> None:
    rates: dict[str, Any] = {"prefill_tokens_per_s": 500.0, "decode_step_s": 0.01, "mean_output_tokens": 10.0}
    async with router_world("a", "b", strategies={"auto": {"threshold": 50}}) as world:

        async def report(engine_id: str, **fields: Any) -> None:
            world.engines[engine_id].load = load = wire.EngineLoad(**rates, **fields)
            [connection] = [c for c in world.router.registry.joined() if c.engine_id == engine_id]
            await eventually(lambda: connection.load == load, "heartbeat")

        assert len((await world.gateway.generate(list(range(60)))).result.engines) == 1  # nothing is measured
        await report("a")
        await report("b")
        assert len((await world.gateway.generate(list(range(49)))).result.engines) == 1
        assert len((await world.gateway.generate(list(range(60)))).result.engines) == 2
        await report("b", num_running=8)  # it has no time to compute a part meanwhile
        assert (await world.gateway.generate(list(range(60)))).result.engines == ["a"]
        await report("a", prefill_share=0.9)  # where answers would be held up: they are decoded at b
        assert (await world.gateway.generate(list(range(60)))).result.engines == ["b", "a"]


@pytest.mark.parametrize("item", BUILT_IN, ids=lambda item: item.name)
def test_strategies_are_short_and_name_their_source(item: Any) -> None:
    path = inspect.getsourcefile(item.function)
    assert path is not None
    assert Path(path).stem == item.name
    source = Path(path).read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 60
    module = ast.parse(source)
    assert "Source" in (ast.get_docstring(module) or "")
    functions = [node for node in module.body if isinstance(node, ast.AsyncFunctionDef | ast.FunctionDef)]
    lines: set[int] = set()
    for function in functions:
        assert ast.get_docstring(function)
        for statement in function.body[1:]:
            lines.update(node.lineno for node in ast.walk(statement) if hasattr(node, "lineno"))
    assert len(lines) <= 25
