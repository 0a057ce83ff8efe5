"""Labels in a router: the highest version counts, running requests stay, a strategy's own are its own."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, cast

import pytest
import structlog
from hypothesis import example, given, settings
from hypothesis import strategies as st

from microserve.protocol import log
from microserve.protocol.errors import StrategyError
from microserve.protocol.messages.engine import EngineLoad
from microserve.protocol.messages.strategy.control import ControlState, EngineLabels
from microserve.services.links.stream import Tokens
from microserve.services.router.authoring.mesh import Mesh
from microserve.services.router.authoring.plan import PlanMesh
from microserve.services.router.authoring.view import MAX_ENGINES, OwnLabels, StrategyState
from microserve.services.router.engines.connection import Connection
from microserve.services.router.engines.load import LoadBook
from microserve.services.router.request.request import Request
from microserve.services.router.rollout.book import StrategyBook
from microserve.services.router.rollout.control import StrategyControl
from microserve.services.router.strategies import BUILT_IN
from microserve.services.router.strategies.splitting.elastic_roles import LABELS, ROLES, elastic_roles
from microserve.services.simulation.loop import VirtualLoop
from tests.support.examples import examples
from tests.support.router.paper_mesh import PaperEngine, by_id, paper_mesh
from tests.support.router.router_world import (
    World,
    eventually,
    expected_output,
    in_loop,
    router_world,
    serve_with,
    start_with,
)

PROMPT = list(range(40))
PD = {"a": ["prefill"], "b": ["decode"]}


def state(version: int, **labels: Sequence[str]) -> ControlState:
    return ControlState(version, [], [EngineLabels(engine, [*each]) for engine, each in labels.items()])


# --- an operator's ---------------------------------------------------------------------------------

STATES = st.dictionaries(st.sampled_from("abc"), st.lists(st.sampled_from("xyz"), unique=True))


@given(st.lists(STATES, min_size=1, max_size=8), st.data())
def test_any_order_loss_and_repetition_gives_the_highest_version(
    labels: list[dict[str, list[str]]], data: st.DataObject
) -> None:
    control = StrategyControl(StrategyBook(BUILT_IN), lambda: 0.0)
    delivered = data.draw(st.lists(st.integers(1, len(labels)), max_size=20))
    in_force: dict[str, list[str]] = {}
    for version in delivered:
        told = state(version, **labels[version - 1])
        if control.apply(told):
            in_force = {each.engine: each.labels for each in told.labels}
    expected = labels[max(delivered) - 1] if delivered else {}
    assert (in_force, control.version) == (expected, max(delivered, default=0))


async def apply(world: World, control_state: ControlState) -> None:
    """As the index does; waits until it is applied."""
    await eventually(lambda: world.index.last_watch is not None, "watches")
    world.index.control(control_state)
    await eventually(lambda: world.index.acknowledged() == (control_state.version, []), "acknowledged")


async def engines_of(world: World, strategy: str = "disaggregated") -> list[str]:
    answer = await world.gateway.generate(PROMPT, strategy=strategy)
    assert answer.token_ids == expected_output(4), answer.result
    return answer.result.engines


@in_loop
async def test_the_next_request_goes_by_the_new_labels() -> None:
    async with router_world("a", "b", labels=PD) as world:
        assert await engines_of(world) == ["b", "a"]
        with structlog.testing.capture_logs() as logs:
            await apply(world, state(1, a=["decode"], b=["prefill"], unknown=["decode"]))
        assert await engines_of(world) == ["a", "b"]
        told = [(e["engine_id"], e["labels"]) for e in logs if e["event"] == log.ENGINE_LABELLED]
        assert sorted(told) == [("a", ["decode"]), ("b", ["prefill"])]
        await apply(world, state(3, b=["prefill"]))
        world.index.control(state(2, a=["decode"]))  # late
        await world.beats(1)
        assert {c.engine_id: list(c.labels) for c in world.router.registry.joined()} == {
            "a": ["prefill"],
            "b": ["prefill"],
        }
        await apply(world, state(4, a=[], b=["far"]))
        assert await engines_of(world) == ["a", "b"], "one without labels serves every label"
        await apply(world, state(5))
        assert await engines_of(world) == ["b", "a"], "what they announce counts again"


@in_loop
async def test_what_runs_on_an_engine_is_untouched() -> None:
    async with router_world("a", "b", labels=PD) as world:
        world.engines["b"].paused.add("decode")
        running = world.gateway.start(PROMPT, strategy="disaggregated", max_tokens=8)
        await eventually(lambda: running.num_outputs > 0, "first token")
        await apply(world, state(1, a=["decode"], b=["prefill"]))
        assert await engines_of(world, "disaggregated") == ["a", "b"]
        world.engines["b"].resume("decode")
        await running.wait()
        assert running.token_ids == expected_output(8)
        assert running.result.engines == ["b", "a"]


@in_loop
async def test_another_life_of_an_engine_and_one_that_comes_later_have_the_labels() -> None:
    async with router_world("a", "b", labels=PD) as world:
        await apply(world, state(1, b=["mine"], c=["yours"]))
        world.engines["b"].die()
        await eventually(lambda: len(world.router.registry.joined()) == 1, "b is lost")
        world.engines["b"].close()
        world.add_engine("b", 2, labels=["decode"])
        world.add_engine("c", labels=["prefill"])
        await world.list_engines()
        labels = {c.engine_id: list(c.labels) for c in world.router.registry.joined()}
        assert labels == {"a": ["prefill"], "b": ["mine"], "c": ["yours"]}


# --- a strategy's own ------------------------------------------------------------------------------


def test_own_labels_end_when_the_mesh_says_something_else() -> None:
    own = OwnLabels()
    own.give("e", ["x"], ["prefill"])
    assert (own.of("e", ["prefill"]), own.of("other", ["y"])) == (("x",), ["y"])
    assert own.of("e", ["decode"]) == ["decode"]
    assert own.of("e", ["prefill"]) == ["prefill"], "they do not come back"
    own.give("e", ["x"], ())
    assert own.of("e", []) == ("x",)
    own.give("e", [], ())
    assert (own.of("e", []), len(own)) == ([], 0)


def test_own_labels_are_bounded() -> None:
    own = OwnLabels()
    for number in range(MAX_ENGINES + 10):
        own.give(f"e{number}", ["x"], [])
    assert len(own) == MAX_ENGINES
    assert (own.of("e9", []), own.of("e10", [])) == ([], ("x",))


def test_a_strategy_labels_engines_for_its_own_picks() -> None:
    with paper_mesh(PaperEngine("a", labels=["decode"]), PaperEngine("b", labels=["decode"])) as (
        mesh,
        request,
    ):
        a = by_id(mesh)["a"]
        mesh.label(a, "prefill", "near")
        assert (list(a.labels), list(a.shared_labels)) == (["prefill", "near"], ["decode"])
        assert {mesh.pick("prefill", request).id for _ in range(20)} == {"a"}
        assert [engine.id for engine in mesh.engines("decode")] == ["b"]
        mesh.label(a)
        assert [engine.id for engine in mesh.engines("decode")] == ["a", "b"]
        for wrong in (["any"], [""], ["two words"], ["x", "x"]):
            with pytest.raises(StrategyError, match="engine a"):
                mesh.label(a, *wrong)


@in_loop
async def test_they_are_one_strategys_and_an_operators_word_ends_them() -> None:
    async def swapped(mesh: Mesh, request: Request) -> AsyncGenerator[Tokens, None]:
        for engine in mesh.engines():
            if not mesh.state:
                mesh.label(engine, "decode" if engine.id == "a" else "prefill")
        mesh.state["begun"] = True
        async for tokens in mesh.pick("decode", request).start_generate(request):
            yield tokens

    async def plain(mesh: Mesh, request: Request) -> AsyncGenerator[Tokens, None]:
        async for tokens in mesh.pick("decode", request).start_generate(request):
            yield tokens

    async with router_world("a", "b", labels=PD) as world:
        answer = await serve_with(world, swapped, PROMPT)
        name = answer.result.strategy
        assert answer.result.engines == ["a"]
        assert await engines_of(world, name) == ["a"]
        assert await engines_of(world) == ["b", "a"], "others see the mesh's"
        assert await engines_of(world, start_with(world, plain)) == ["b"], "and so do other strategies"
        await apply(world, state(1, a=["other"]))
        assert await engines_of(world, name) in (["a"], ["b"])
        await apply(world, state(2, a=["other"], b=["decode", "near"]))
        assert await engines_of(world, name) == ["b"]


# --- elastic_roles ---------------------------------------------------------------------------------

PERIOD_S, DRAIN_S = 1.0, 4.0


def no_request(*_: object) -> AbstractAsyncContextManager[tuple[Mesh, Request]]:
    raise AssertionError("this plan makes no request")


class Roles:
    """The plan of ``elastic_roles`` over engines that are only numbers, in virtual time."""

    def __init__(self, *engines: PaperEngine) -> None:
        self.engines = list(engines)
        self.mesh = PlanMesh(
            lambda: cast("list[Connection]", self.engines),
            LoadBook(),
            random.Random(0),
            StrategyState(),
            no_request,
        )

    def now(self) -> dict[str, str]:
        return {engine.id: " ".join(engine.labels) for engine in self.mesh.engines()}

    async def wait(self, periods: float) -> None:
        """Let the plan look so often; reports stay fresh."""
        for _ in range(int(periods)):
            for engine in self.engines:
                engine.load_at = asyncio.get_running_loop().time()
            await asyncio.sleep(PERIOD_S)

    async def begin(self) -> asyncio.Task[None]:
        values = {"period_s": PERIOD_S, "ttft_s": 1.0, "drain_s": DRAIN_S}
        plan = asyncio.create_task(elastic_roles.bind(values).start_plan(self.mesh))
        await asyncio.sleep(PERIOD_S / 2)
        return plan


def in_plan(roles: Roles, test: Any) -> None:
    async def main() -> None:
        plan = await roles.begin()
        try:
            await test()
            assert not plan.done()
        finally:
            plan.cancel()

    VirtualLoop().run(main())


def busy(running: int = 0, queued: int = 0) -> EngineLoad:
    return EngineLoad(
        num_running=running,
        num_waiting=1 if queued else 0,
        queued_prefill_tokens=queued,
        prefill_tokens_per_s=1000.0,
        max_num_seqs=8,
        free_blocks=1000,
    )


def test_engines_without_a_role_get_one_and_others_keep_theirs() -> None:
    engines = [
        PaperEngine("a"),
        PaperEngine("b", labels=["rack-1"]),
        PaperEngine("c"),
        PaperEngine("d", labels=["prefill"]),
    ]
    roles = Roles(*engines)

    async def test() -> None:
        assert roles.now() == {"a": "decode", "b": "decode", "c": "prefill", "d": "prefill"}

    in_plan(roles, test)


def test_one_engine_and_two_engines_stay_as_they_are_whatever_the_load() -> None:
    for number in (1, 2):
        roles = Roles(*(PaperEngine(f"e{each}") for each in range(number)))

        async def test(roles: Roles = roles) -> None:
            begun = roles.now()
            for load in (busy(8), busy(0, 50_000)):
                for engine in roles.engines:
                    engine.load = load
                await roles.wait(10)
                assert roles.now() == begun

        in_plan(roles, test)


def test_an_engine_drains_before_it_prefills() -> None:
    a, b, c = PaperEngine("a"), PaperEngine("b"), PaperEngine("c")
    roles = Roles(a, b, c)

    async def test() -> None:
        assert roles.now() == {"a": "decode", "b": "prefill", "c": "decode"}
        a.load, b.load, c.load = busy(4), busy(1, 5_000), busy(3)
        await roles.wait(2)
        assert roles.now() == {"a": "decode", "b": "prefill", "c": "to-prefill"}, "the one with less to do"
        c.load = busy(2)
        await roles.wait(1)
        assert roles.now()["c"] == "prefill", "few are left"
        b.load = busy()
        a.load = busy(8)
        await roles.wait(12)
        assert sorted(roles.now().values()) == ["decode", "decode", "prefill"], "and back"

    in_plan(roles, test)


def test_an_engine_does_not_drain_for_ever() -> None:
    a, b, c = PaperEngine("a"), PaperEngine("b"), PaperEngine("c")
    roles = Roles(a, b, c)

    async def test() -> None:
        a.load, b.load, c.load = busy(4), busy(1, 50_000), busy(3)
        await roles.wait(2)
        assert roles.now()["c"] == "to-prefill"
        await roles.wait(DRAIN_S + 1)
        assert roles.now()["c"] == "prefill"

    in_plan(roles, test)


def test_a_load_that_stays_moves_engines_until_it_fits_and_never_to_and_fro() -> None:
    roles = Roles(*(PaperEngine(f"e{number}") for number in range(6)))

    async def test() -> None:
        moments = []
        for _ in range(40):
            pools = {role: [e for e in roles.engines if roles.now()[e.engine_id] == role] for role in ROLES}
            for engine in pools["prefill"]:  # the same work, whoever does it
                engine.load = busy(1, 12_000 // len(pools["prefill"]))
            for engine in pools["decode"]:
                engine.load = busy(6 // len(pools["decode"]))
            await roles.wait(1)
            moments.append(tuple(sorted(roles.now().values())))
        assert moments[-1].count("prefill") == 5
        assert len(set(moments[20:])) == 1

    in_plan(roles, test)


STEPS = st.lists(
    st.tuples(
        st.sets(st.integers(0, 5), min_size=1),
        st.lists(
            st.tuples(st.integers(0, 8), st.sampled_from([0, 100, 3_000, 50_000])), min_size=6, max_size=6
        ),
        st.integers(1, 6),
    ),
    max_size=6,
)


AWAY = (0, 0)
ONE_COMES_BACK: list[Any] = [  # e4 leaves while it drains; meanwhile another one begins to
    ({0, 1, 2, 3, 4}, [AWAY, (0, 100), AWAY, (0, 50_000), AWAY, AWAY], 1),
    ({0, 1, 2, 5}, [AWAY] * 6, 1),
    ({0, 1, 2, 3, 4}, [AWAY, (2, 100), AWAY, AWAY, (2, 100), AWAY], 1),
]


@settings(max_examples=examples(60), deadline=None)
@given(STEPS)
@example(ONE_COMES_BACK)
def test_whoever_comes_and_goes_both_roles_are_there(steps: list[Any]) -> None:
    everyone = [
        PaperEngine(f"e{number}", labels=[["decode"], ["prefill"], []][number % 3]) for number in range(6)
    ]
    roles = Roles(*everyone)

    async def test() -> None:
        for present, loads, periods in steps:
            for engine, load in zip(everyone, loads, strict=True):
                engine.load = busy(*load)
            roles.engines = [everyone[number] for number in sorted(present)]
            await roles.wait(periods)
            assert set(roles.now().values()) <= LABELS
            assert sum(role.startswith("to-") for role in roles.now().values()) <= 1
        await roles.wait(3 * DRAIN_S)
        assert len(roles.engines) == 1 or set(ROLES) <= set(roles.now().values())

    in_plan(roles, test)
