"""Labels moved under load in virtual time: by an operator through a storm, and by a strategy of its own."""

from __future__ import annotations

import asyncio
import random
import statistics
from collections.abc import Awaitable, Callable, Sequence

import pytest

from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.protocol.messages.strategy.control import LABEL, UNLABEL, Change, Changed
from microserve.services.router.service import Router
from microserve.services.simulation.faults.judge import judge_answer, judge_rest
from microserve.services.simulation.faults.scenario import draw
from microserve.services.simulation.gateway import Answer
from microserve.services.simulation.journal import Journal
from microserve.services.simulation.loop import Process, VirtualLoop
from microserve.services.simulation.mesh import INDEX, Shape, SimulatedMesh, until
from microserve.services.simulation.network import Endpoint, Weather

STORM = Weather(drop=0.2, duplicate=0.3, reorder=0.3, delay=0.3, max_delay_s=0.3)
NUM_MOVES = 300
MOVE_S = 0.1
REQUEST_S = 0.03
ANNOUNCED = (("decode",), ("prefill",), ())
CHOICES: Sequence[list[str] | None] = ([], ["prefill"], ["decode"], ["prefill", "decode"], ["far"], None)
"""None: back to what the engine announces."""


def in_mesh(shape: Shape, test: Callable[[SimulatedMesh], Awaitable[list[Answer]]]) -> list[Answer]:
    """All answers; no defect and no wrong token."""
    loop = VirtualLoop()
    journal = Journal(loop, keep=False)
    journal.open()

    async def run() -> list[Answer]:
        mesh = SimulatedMesh(loop, 0, shape, journal)
        try:
            mesh.start_all()
            await asyncio.sleep(1.0)
            answers = await test(mesh)
            async with asyncio.timeout(60):
                while not all(answer.outcome for answer in answers):
                    await asyncio.sleep(0.1)
            await asyncio.sleep(2.0)
            await until(lambda: not judge_rest(mesh), 30.0)
            assert judge_rest(mesh) == []
            return answers
        finally:
            mesh.close()

    try:
        answers = loop.run(run())
    finally:
        journal.close()
    assert (journal.defects, loop.failures) == ([], [])
    assert [problem for answer in answers for problem in judge_answer(answer)] == []
    return answers


def unserved(answers: list[Answer]) -> list[str]:
    return [answer.outcome for answer in answers if not answer.is_complete]


def submit(mesh: SimulatedMesh, answer: Answer, strategy: str, router: str = "router-0") -> Answer:
    answer.strategy = strategy
    mesh.seats["gateway-0"].service.submit(answer, mesh.address(router), ttl_s=30.0)
    return answer


# --- an operator's ---------------------------------------------------------------------------------


def label(mesh: SimulatedMesh, number: int, engine: str, labels: list[str] | None) -> int:
    """As ``microserve label`` does; the version."""
    kind = UNLABEL if labels is None else LABEL
    change = Change(number, f"label {number}", kind, "", engine=engine, labels=labels or [])
    reply = mesh.seats[INDEX].service.control.answer(change, "")
    assert isinstance(reply, Changed)
    return reply.version


def storm_over_control(mesh: SimulatedMesh) -> None:
    """Between the index and the routers only."""
    network, carry = mesh.network, mesh.network.carry

    def stormy(origin: Process, endpoint: Endpoint, frames: Sequence[bytes]) -> None:
        ends = {origin.name, endpoint.process.name}
        network.weather = STORM if INDEX in ends and ends & set(mesh.routers) else Weather()
        carry(origin, endpoint, frames)

    vars(network)["carry"] = stormy


def seen(mesh: SimulatedMesh, router: str) -> dict[str, list[str]]:
    """Labels of the engines that a router is connected to."""
    service: Router = mesh.seats[router].service
    return {each.engine_id: list(each.labels) for each in service.registry.joined()}


def version(mesh: SimulatedMesh, router: str) -> int:
    """Of the control state that a router has applied."""
    service: Router = mesh.seats[router].service
    return service.control.version


def test_labels_moved_under_load_lose_nothing_and_are_the_last_ones_everywhere() -> None:
    shape = Shape(num_engines=3, num_routers=2, num_blocks=512, max_num_seqs=16, labels=ANNOUNCED)

    async def move(mesh: SimulatedMesh) -> list[Answer]:
        storm_over_control(mesh)
        rng, answers = random.Random(0), list[Answer]()
        announced = {name: list(each) for name, each in zip(mesh.engines, ANNOUNCED, strict=True)}
        labels: dict[str, list[str]] = {}

        async def load() -> None:
            while True:
                template = draw(rng.randrange(40)).arrivals[0]
                answer = Answer(f"r-{len(answers)}", list(template.prompt), template.params, mesh.loop.now)
                strategy = rng.choice(["disaggregated", "balanced", "cache_aware", "elastic_roles"])
                answers.append(submit(mesh, answer, strategy, rng.choice(mesh.routers)))
                await asyncio.sleep(REQUEST_S)

        loading = asyncio.create_task(load())
        last = 0
        for number in range(1, NUM_MOVES + 1):
            engine = rng.choice(mesh.engines)
            choice = rng.choice([each for each in CHOICES if each is not None or engine in labels])
            last = label(mesh, number, engine, choice)
            labels.pop(engine, None)
            if choice is not None:
                labels[engine] = choice
            if number == NUM_MOVES // 2:  # a life ends, the next one has the label too
                label(mesh, 1000, "engine-2", ["kept"])
                mesh.kill("engine-2")
                mesh.kill("router-1")
                labels["engine-2"] = ["kept"]
            if number == NUM_MOVES // 2 + 5:
                mesh.start("engine-2")
                mesh.start("router-1")
            await asyncio.sleep(MOVE_S)
        loading.cancel()
        expected = announced | labels
        # The last move may have changed nothing: then only the version says that it has come.
        await until(lambda: all(version(mesh, name) == last for name in mesh.routers), 30.0)
        await until(lambda: all(seen(mesh, name) == expected for name in mesh.routers), 30.0)
        assert [seen(mesh, name) for name in mesh.routers] == [expected] * 2
        assert {version(mesh, name) for name in mesh.routers} == {last}
        assert min(mesh.network.faults.values()) > 20
        vars(mesh.network).pop("carry")
        mesh.network.weather = Weather()
        return answers

    assert unserved(in_mesh(shape, move)) == []


def test_an_engine_that_restarts_keeps_its_labels() -> None:
    async def restart(mesh: SimulatedMesh) -> list[Answer]:
        label(mesh, 1, "engine-1", ["mine"])
        label(mesh, 2, "engine-7", ["to-come"])
        await until(lambda: seen(mesh, "router-0") == {"engine-0": ["decode"], "engine-1": ["mine"]}, 10.0)
        for _ in range(2):
            mesh.kill("engine-1")
            await until(lambda: "engine-1" not in seen(mesh, "router-0"), 10.0)
            mesh.start("engine-1")
            await until(lambda: "engine-1" in seen(mesh, "router-0"), 10.0)
            assert seen(mesh, "router-0")["engine-1"] == ["mine"]
        label(mesh, 3, "engine-1", None)
        await until(lambda: seen(mesh, "router-0")["engine-1"] == ["prefill"], 10.0)
        assert seen(mesh, "router-0")["engine-1"] == ["prefill"]
        return []

    in_mesh(Shape(num_engines=2, labels=ANNOUNCED[:2]), restart)


# --- a strategy's ----------------------------------------------------------------------------------


def roles(mesh: SimulatedMesh) -> dict[str, str]:
    """What ``elastic_roles`` says of each engine."""
    router: Router = mesh.seats["router-0"].service
    own = router.serving.plans.use(router.strategies.get("elastic_roles")).labels
    joined = router.registry.joined()
    return {each.engine_id: " ".join(own.of(each.engine_id, each.labels)) for each in joined}


Phase = tuple[float, float, int, int]
"""Seconds, seconds between two requests, tokens of a prompt, tokens of an answer."""
PHASES: list[Phase] = [(15.0, 0.033, 120, 2), (20.0, 0.022, 4, 60), (15.0, 0.033, 120, 2)]


def serve_phases(strategy: str) -> tuple[list[Answer], list[list[dict[str, str]]]]:
    """Answers, and the roles at each moment of each phase."""
    moments: list[list[dict[str, str]]] = []

    async def serve(mesh: SimulatedMesh) -> list[Answer]:
        rng, answers = random.Random(1), list[Answer]()
        for seconds, period_s, num_prompt, num_output in PHASES:
            ends_at, seen_roles = mesh.loop.now + seconds, list[dict[str, str]]()
            moments.append(seen_roles)
            while mesh.loop.now < ends_at:
                prompt = [rng.randrange(1, 400) for _ in range(num_prompt)]
                params = SamplingParams(max_tokens=num_output, temperature=0.0, ignore_eos=True)
                answer = Answer(f"r-{len(answers)}", prompt, params, mesh.loop.now)
                answers.append(submit(mesh, answer, strategy))
                await asyncio.sleep(period_s)
                seen_roles.append(roles(mesh))
        return answers

    labels = (("decode",), ("prefill",), ("decode",), ("prefill",), ("decode",))
    shape = Shape(num_engines=5, num_blocks=256, max_waiting=256, max_model_len=200, labels=labels)
    return in_mesh(shape, serve), moments


@pytest.mark.heavy
def test_elastic_roles_follow_the_load(capsys: pytest.CaptureFixture[str]) -> None:
    """Long prompts, then long answers, then long prompts again: more than fixed roles bear."""
    answers, moments = serve_phases("elastic_roles")
    half = [phase[len(phase) // 2 :] for phase in moments]
    num_prefill = [{list(each.values()).count("prefill") for each in phase} for phase in half]
    assert [max(num_prefill[0]), max(num_prefill[1]), max(num_prefill[2])] == [4, 1, 4]
    assert [len(each) for each in num_prefill] == [1, 1, 1], "nothing swings under a steady load"
    for each in [each for phase in moments for each in phase][20:]:
        assert {"prefill", "decode"} <= set(each.values()), "nobody is left without"
        assert sum(role.startswith("to-") for role in each.values()) <= 1
    assert unserved(answers) == []
    fixed, _ = serve_phases("disaggregated")
    times = [
        statistics.mean(answer.ended_at - answer.submitted_at for answer in served if answer.is_complete)
        for served in (answers, fixed)
    ]
    assert times[0] < times[1] / 2
    with capsys.disabled():
        print(
            f"\n{len(answers)} requests take {times[0]:.2f} s each; with fixed roles {times[1]:.2f} s, "
            f"and {len(unserved(fixed))} are refused or too late"
        )
