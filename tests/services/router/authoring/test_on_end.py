"""``on_end``: a strategy hears how each of its requests ended, once, and harms none by what it does then."""

from __future__ import annotations

from typing import Any

import pytest
import structlog

from microserve.protocol.errors import QueueFull, StrategyError
from microserve.protocol.messages import engine as wire
from microserve.services.router.authoring import Chunks, Mesh, Outcome, Request, strategy
from microserve.services.router.oversight.overseer import Overseer
from microserve.services.router.rollout.control import load_source
from tests.support.router.router_world import World, eventually, expected_output, in_loop, router_world

PROMPT = list(range(50))
HEARD: list[tuple[Request, Outcome]] = []


def hear(mesh: Mesh, request: Request, outcome: Outcome, *, factor: float) -> None:
    assert factor == 0.5
    mesh.state["count"] = mesh.state.get("count", 0) + 1
    HEARD.append((request, outcome))


@strategy(on_end=hear)
async def hearing(mesh: Mesh, request: Request, *, factor: float = 0.5, refuse: bool = False) -> Chunks:
    if request.num_tokens == 7:
        raise QueueFull("not today", retry_after_s=1.0)
    if request.num_tokens == 8:
        raise ValueError("a mistake")
    yield mesh.pick(None, request).start_generate(request)


async def ends(world: World, prompt: list[int] | None = None, **fields: Any) -> tuple[Request, Outcome]:
    HEARD.clear()
    await world.gateway.generate(prompt or PROMPT, strategy="hearing", **fields)
    return await heard()


async def heard() -> tuple[Request, Outcome]:
    await eventually(lambda: len(HEARD) == 1, "on_end")
    return HEARD[0]


@in_loop
async def test_it_hears_of_every_end_once() -> None:
    async with router_world("a", "b") as world:
        world.router.strategies.add(hearing)
        request, outcome = await ends(world, attributes={"user": "u"})
        assert (outcome.reason, outcome.code, outcome.is_good, outcome.is_own) == ("length", "", True, True)
        assert (outcome.num_prompt_tokens, outcome.num_output_tokens) == (50, 4)
        assert outcome.ttft_s is not None
        assert outcome.tpot_s is not None
        assert outcome.total_s >= outcome.ttft_s > 0.0
        assert (len(outcome.engines), outcome.strategy, outcome.version) == (1, "hearing", 0)
        assert request.attributes["user"] == "u"

        _, refused = await ends(world, PROMPT[:7])
        assert (refused.reason, refused.code, refused.ttft_s) == ("error", "queue_full", None)
        _, mistaken = await ends(world, PROMPT[:8])
        assert (mistaken.reason, mistaken.is_own) == ("length", False)

        HEARD.clear()
        for engine in world.engines.values():
            engine.manual = True
        answer = world.gateway.start(PROMPT, strategy="hearing")
        await eventually(lambda: any(e.of(wire.StartGenerate)[-1:] for e in world.engines.values()))
        await eventually(lambda: any(answer.request_id in e.held for e in world.engines.values()), "it runs")
        world.gateway.cancel(answer)
        await answer.wait()
        _, left = await heard()
        assert (left.reason, left.is_good) == ("abort", False)
        state = world.router.serving.plans.use(hearing)
        assert state["count"] == 4


@in_loop
async def test_an_answer_that_went_on_elsewhere_is_told_as_that() -> None:
    async with router_world("a", "b") as world:
        world.router.strategies.add(hearing)
        for engine in world.engines.values():
            engine.manual = True
        HEARD.clear()
        answer = world.gateway.start(PROMPT, strategy="hearing")
        await eventually(lambda: any(answer.request_id in e.held for e in world.engines.values()), "it runs")
        first = next(e for e in world.engines.values() if answer.request_id in e.held)
        other = next(e for e in world.engines.values() if e is not first)
        other.manual = False
        first.die()
        await answer.wait()
        request, outcome = await heard()
        assert outcome.engines == (first.engine_id, other.engine_id)
        assert not outcome.is_own
        assert (request.num_tokens, request.num_output_tokens) == (50, 0)


SOURCE = """
from microserve.services.router.authoring import strategy

def on_end(mesh, request, outcome):
    {what}

@strategy(on_end=on_end)
async def mine(mesh, request):
    yield mesh.pick(None, request).start_generate(request)
"""


@pytest.mark.parametrize(
    ("what", "error"),
    [("raise ValueError('whatever')", "whatever"), ("while True: pass", "on_end: StrategyHung")],
)
def test_what_it_raises_or_how_long_it_hangs_is_its_own_affair(what: str, error: str) -> None:
    @in_loop
    async def main() -> None:
        with Overseer(budget_s=0.1) as overseer:
            async with router_world("a", overseer=overseer) as world:
                world.router.strategies.add(load_source(SOURCE.format(what=what), "mine"))
                with structlog.testing.capture_logs() as lines:
                    answer = await world.gateway.generate(PROMPT, strategy="mine")
                    await eventually(lambda: any(error in line.get("error", "") for line in lines), "told")
                assert answer.token_ids == expected_output(4)
                answer = await world.gateway.generate(PROMPT, strategy="mine")
                assert answer.token_ids == expected_output(4), "another serves in its place, if need be"

    main()


def test_its_shape_is_checked() -> None:
    async def body(mesh: Mesh, request: Request) -> Chunks:
        yield mesh.pick(None, request).start_generate(request)

    async def waits(mesh: Mesh, request: Request, outcome: Outcome) -> None: ...
    def few(mesh: Mesh, request: Request) -> None: ...
    def unknown(mesh: Mesh, request: Request, outcome: Outcome, *, what: int) -> None: ...
    def positional(mesh: Mesh, request: Request, outcome: Outcome, what: int) -> None: ...

    for function, what in (
        (waits, "on_end must be a plain 'def'"),
        (few, r"on_end must take \(mesh, request, outcome, \*, parameters of the strategy\)"),
        (unknown, "on_end's what is no parameter of the strategy"),
        (positional, "on_end's what is no parameter"),
    ):
        with pytest.raises(StrategyError, match=what):
            strategy(on_end=function)(body)  # type: ignore[arg-type]
