"""Published strategies in a router: applied between two requests, never mixed, given up when they fail."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

import msgspec
import pytest
import structlog
from hypothesis import given, settings
from hypothesis import strategies as st

from microserve.protocol import log
from microserve.protocol.errors import ConfigError, StrategyNotFound
from microserve.protocol.messages.strategy.control import ControlEntry, ControlState, Scalar, VersionFault
from microserve.services.router.rollout.book import Published
from microserve.services.router.rollout.control import load_source
from microserve.services.router.rollout.window import (
    MIN_ERRORS,
)
from microserve.services.router.strategies import BUILT_IN
from tests.support.examples import examples
from tests.support.router.control_world import PLAIN, make, serving, state, version
from tests.support.router.router_world import World, eventually, expected_output, in_loop, router_world

FAILS_AT_ONCE = PLAIN.replace("    async for", "    raise ValueError('boo')\n    async for")
FAILS_LATER = PLAIN.replace(
    "        yield tokens",
    "        yield type(tokens)(tokens.offset, tokens.token_ids[:2], [], None)\n        raise ValueError()",
)
LEAVES = PLAIN.replace("    async for", "    raise SystemExit(3)\n    async for")
LEAKS = PLAIN.replace("    async for", "    await mesh.pick(None, request).prep_recv(request)\n    async for")
PROMPT = [1, 2, 3, 4, 5]


def given_parameters(number: int, source: str, parameters: dict[str, Scalar]) -> ControlState:
    return state(number, ControlEntry("mine", version(number, source, **parameters)))


def test_a_published_strategy_is_there_under_its_name_and_goes_with_its_entry() -> None:
    book, control, _ = make()
    assert control.apply(serving(1, ratio=1))
    strategy = book.get("mine", "r")
    assert (strategy.name, strategy.version, dict(strategy.values)) == (
        "mine",
        1,
        {"label": "", "ratio": 1.0},
    )
    assert "mine" in book.names
    assert control.apply(state(2))
    with pytest.raises(StrategyNotFound):
        book.get("mine", "r")
    assert book.names == sorted(strategy.name for strategy in BUILT_IN)


def test_a_name_that_the_router_came_with_is_replaced_and_comes_back() -> None:
    book, control, _ = make()
    own = book.get("balanced")
    control.apply(serving(1, PLAIN, "balanced"))
    assert book.get("balanced").version == 1
    control.apply(serving(2, "", "balanced", ratio=0.25))
    assert (book.get("balanced").function, book.get("balanced").values["ratio"]) == (own.function, 0.25)
    control.apply(state(3, ControlEntry("balanced")))
    assert book.get("balanced") == own


def test_a_name_that_nothing_is_left_of_is_served_plainly() -> None:
    book, control, _ = make()
    control.apply(serving(1))
    control.apply(state(2, ControlEntry("mine")))
    assert (book.get("mine").name, book.get("mine").version) == ("mine", 0)


@pytest.mark.parametrize(
    ("source", "parameters", "says"),
    [
        ("def", {}, "SyntaxError"),
        ("import no_such_module", {}, "ModuleNotFoundError"),
        ("x = 1", {}, "no strategy mine"),
        ("raise SystemExit", {}, "SystemExit"),
        ("raise KeyboardInterrupt", {}, "KeyboardInterrupt"),
        ("def f(): f()\nf()", {}, "RecursionError"),
        (PLAIN.replace("async def", "def").replace("async for", "for"), {}, "async def"),
        (PLAIN, {"ratio": "much"}, "must be a number"),
        (PLAIN, {"rato": 0.5}, "no such parameter"),
    ],
)
def test_what_cannot_be_loaded_leaves_the_running_version_in_place(
    source: str, parameters: dict[str, Scalar], says: str
) -> None:
    book, control, _ = make()
    control.apply(serving(1))
    running = book.get("mine")
    with structlog.testing.capture_logs() as logs:
        assert control.apply(given_parameters(2, source, parameters)), "it is applied as far as can be"
    assert control.version == 2
    [fault] = control.faults
    assert (fault.strategy, fault.version) == ("mine", 2)
    assert says in fault.reason
    assert book.get("mine") == running
    assert [e["version"] for e in logs if e["event"] == log.STRATEGY_REJECTED] == [2]
    control.apply(state(3, ControlEntry("mine", version(1))))
    assert control.faults == []


def test_a_source_that_holds_several_strategies_must_name_the_one() -> None:
    two = PLAIN + PLAIN.replace("mine", "other")
    assert load_source(two, "other").name == "other"
    assert load_source(PLAIN, "called_otherwise").name == "called_otherwise"
    with pytest.raises(ConfigError, match="no strategy third"):
        load_source(two, "third")


def test_a_source_runs_once_however_often_it_comes_back() -> None:
    book, control, _ = make()
    counting = "import builtins\nbuiltins.num_runs = getattr(builtins, 'num_runs', 0) + 1\n" + PLAIN
    import builtins

    try:
        control.apply(serving(1, counting))
        control.apply(serving(2, counting, ratio=0.5))
        control.apply(state(3, ControlEntry("mine", version(1, counting))))
        assert book.get("mine").version == 1
        assert vars(builtins)["num_runs"] == 1
    finally:
        vars(builtins).pop("num_runs", None)


# --- convergence -----------------------------------------------------------------------------------


def _states() -> list[ControlState]:
    """Some history; every fourth version cannot be loaded."""
    rng, made = random.Random(5), []
    for number in range(1, 13):
        source = "syntax error" if number % 4 == 0 else PLAIN.replace("{number}", str(number % 3))
        canary = version(number, PLAIN) if rng.random() < 0.3 else None
        stable = version(number if canary is None else max(1, number - 1), source)
        made.append(state(number, ControlEntry("mine", stable, canary, 0.5 if canary else 0.0)))
    return made


STATES = _states()


@settings(max_examples=examples(150), deadline=None)
@given(st.lists(st.sampled_from(range(len(STATES))), max_size=30))
def test_any_order_repetition_and_loss_converge_to_the_highest_version(order: Sequence[int]) -> None:
    """What is lost is sent again until it is acknowledged: in the end everybody has seen the last."""
    book, control, _ = make()
    highest = 0
    for index in order:
        applied = control.apply(STATES[index])
        assert applied == (STATES[index].version > highest)
        highest = max(highest, STATES[index].version)
        assert control.version == highest
    control.apply(STATES[-2])
    control.apply(STATES[-2])
    only, only_control, _ = make()
    only_control.apply(STATES[-2])
    if highest <= STATES[-2].version:
        assert control.version == STATES[-2].version
        assert control.faults == only_control.faults
        if not control.faults:
            there, here = only.published["mine"], book.published["mine"]
            assert (here.stable.version, here.share) == (there.stable.version, there.share)
            assert (here.canary and here.canary.version) == (there.canary and there.canary.version)


# --- canaries --------------------------------------------------------------------------------------


def test_a_canary_gets_its_share_by_the_requests_id_alone() -> None:
    book, control, _ = make()
    control.apply(state(2, ControlEntry("mine", version(1), version(2), 0.1)))
    ids = [f"request-{number}" for number in range(10_000)]
    chosen = {request_id for request_id in ids if book.get("mine", request_id).version == 2}
    print(f"canary at 10 %: {len(chosen) / 100:.2f} % of 10,000 requests")
    assert 900 <= len(chosen) <= 1100
    other, other_control, _ = make()
    other_control.apply(state(3, ControlEntry("mine", version(1), version(3), 0.3)))
    more = {request_id for request_id in ids if other.get("mine", request_id).version == 3}
    assert chosen < more, "a larger share only adds requests, on every router"
    assert 2800 <= len(more) <= 3200


def test_a_sticky_canary_has_all_requests_of_one_user_or_none() -> None:
    book, control, _ = make()
    sticky = msgspec.structs.replace(version(2), sticky_by="user")
    control.apply(state(2, ControlEntry("mine", version(1), sticky, 0.3, sticky, 0.3)))

    def served(request_id: str, **attributes: str) -> tuple[int, bool]:
        return book.get("mine", request_id, attributes).version, (
            book.shadow("mine", request_id, attributes) is not None
        )

    users = [f"user-{number}" for number in range(2_000)]
    by_user = {user: {served(f"{user}-{number}", user=user) for number in range(5)} for user in users}
    assert all(len(seen) == 1 for seen in by_user.values())
    of_each = [next(iter(seen)) for seen in by_user.values()]
    for chosen in ([number == 2 for number, _ in of_each], [shadowed for _, shadowed in of_each]):
        assert 0.26 <= sum(chosen) / len(users) <= 0.34
    without = [served(f"request-{number}", tenant="t", user="") for number in range(2_000)]
    assert 0.26 <= sum(number == 2 for number, _ in without) / len(without) <= 0.34


def test_a_share_of_all_is_all() -> None:
    stable = load_source(PLAIN, "mine")
    canary = load_source(PLAIN.replace("{number}", "2"), "mine")
    assert all(Published(stable, canary, 1.0).choose(f"{number}") is canary for number in range(500))


# --- in a router -----------------------------------------------------------------------------------


async def publish(world: World, control_state: ControlState) -> None:
    """As the index does; waits until it is applied."""
    world.index.control(control_state)
    await eventually(lambda: world.router.control.version == control_state.version, "applied")


@in_loop
async def test_a_router_applies_and_acknowledges_at_once() -> None:
    async with router_world("e1") as world:
        await eventually(lambda: world.index.acknowledged() == (0, []), "a router says that it takes states")
        await publish(world, serving(7))
        await eventually(lambda: world.index.acknowledged() == (7, []), "acknowledged")
        answer = await world.gateway.generate(PROMPT, strategy="mine")
        assert answer.token_ids == expected_output(4)
        assert (answer.result.strategy, answer.result.strategy_version) == ("mine", 7)
        await publish(world, serving(8, "def"))
        await eventually(
            lambda: [f.version for f in world.index.acknowledged()[1]] == [8], "the fault is told"
        )
        answer = await world.gateway.generate(PROMPT, strategy="mine")
        assert answer.result.strategy_version == 7


@in_loop
async def test_requests_in_flight_finish_on_the_version_that_they_began_with() -> None:
    async with router_world("e1", "e2", labels={"e1": ["old"], "e2": ["new"]}) as world:
        await publish(world, serving(1, label="old"))
        world.engines["e1"].paused.add("decode")
        old = [world.gateway.start(PROMPT, strategy="mine") for _ in range(5)]
        await eventually(lambda: len(world.router.serving) == 5, "they run")
        await publish(world, serving(2, label="new"))
        new = [await world.gateway.generate(PROMPT, strategy="mine") for _ in range(5)]
        world.engines["e1"].resume("decode")
        for answer in old:
            assert (await answer.wait()).strategy_version == 1
            assert answer.result.engines == ["e1"]
        for answer in new:
            assert answer.result.strategy_version == 2
            assert answer.result.engines == ["e2"]
        assert all(answer.token_ids == expected_output(4) for answer in old + new)


@pytest.mark.parametrize("source", [FAILS_AT_ONCE, FAILS_LATER, LEAVES], ids=["at_once", "later", "exit"])
@in_loop
async def test_a_version_that_fails_costs_no_client_anything_and_is_reported(source: str) -> None:
    async with router_world("e1") as world:
        await publish(world, serving(1, source))
        with structlog.testing.capture_logs() as logs:
            for _ in range(MIN_ERRORS):
                answer = await world.gateway.generate(PROMPT, strategy="mine", max_tokens=6)
                assert answer.token_ids == expected_output(6)
                assert (answer.result.reason, answer.result.strategy_version) == ("length", 1)
            await eventually(lambda: [f.version for f in world.index.acknowledged()[1]] == [1], "reported")
        failed = [entry for entry in logs if entry["event"] == log.STRATEGY_FAILED]
        assert [entry["strategy_version"] for entry in failed] == [1] * MIN_ERRORS
        await publish(world, state(2, ControlEntry("mine")))
        answer = await world.gateway.generate(PROMPT, strategy="mine")
        assert (answer.token_ids, answer.result.strategy_version) == (expected_output(4), 0)


@in_loop
async def test_forgotten_grants_are_given_up_on_too() -> None:
    async with router_world("e1") as world:
        await publish(world, serving(1, LEAKS))
        for _ in range(MIN_ERRORS):
            answer = await world.gateway.generate(PROMPT, strategy="mine")
            assert answer.token_ids == expected_output(4)
        await eventually(lambda: [f.version for f in world.index.acknowledged()[1]] == [1], "reported")


@in_loop
async def test_a_canary_that_is_slow_is_given_up_beside_the_routers_own_strategy() -> None:
    slow = PLAIN.replace("    async for", "    import asyncio\n    await asyncio.sleep(0.15)\n    async for")
    async with router_world("e1") as world:
        await publish(world, state(1, ControlEntry("data_parallel", None, version(1, slow), 0.5)))
        versions: set[int] = set()
        faults: Sequence[VersionFault] = ()
        async with asyncio.timeout(60.0):
            # Requests in whose time the router itself stood still count for nobody: so many as it takes.
            while not faults:
                answers = [world.gateway.start(PROMPT, strategy="data_parallel") for _ in range(50)]
                versions |= {(await answer.wait()).strategy_version for answer in answers}
                faults = world.index.acknowledged()[1]
        assert versions == {0, 1}
        assert [fault.version for fault in faults] == [1]
        assert "TTFT" in faults[0].reason
