"""``microserve.testing``: a mesh in memory, and what an author's test can say of how a request was served."""

from __future__ import annotations

import asyncio
import inspect
from pathlib import Path

import pytest
import structlog

from microserve.protocol.errors import ConfigError
from microserve.services.router.authoring import Chunks, Mesh, Request, Tokens, strategy
from microserve.testing import Engine, MeshInMemory, Picked, Send, in_memory
from microserve.testing import mesh as mesh_in_memory
from microserve.testing.fixtures import MakeMesh, make_mesh

__all__ = ["make_mesh"]

PAIR = Engine("p", labels=["prefill"]), Engine("d", labels=["decode"])


@in_memory("balanced", *PAIR, parameters={"ratio": 0.1})
async def test_the_plan_says_who_did_which_part(mesh: MeshInMemory) -> None:
    answer = await mesh.ask(prompt_tokens=1000)
    plan = answer.plan
    assert plan.sends == [Send("p", "d", 0, 900)]
    assert (plan.generated_on, plan.generated_from) == ("d", 900)
    assert plan.prefilled == {"p": [(0, 900)], "d": [(900, 1000)]}
    assert answer.num_received_tokens == 900
    assert [(pick.label, pick.chosen) for pick in plan.picks] == [("decode", "d"), ("prefill", "p")]
    assert plan.num_attempts == 1
    assert len(answer.token_ids) == 4
    assert 0.0 < (answer.ttft_s or 0.0) <= answer.total_s


@in_memory("token_aware", Engine("a"), Engine("b"))
async def test_a_cache_that_is_warm_is_known(mesh: MeshInMemory) -> None:
    prompt = mesh.prompt(500)
    await mesh.warm("b", prompt)
    answer = await mesh.ask(prompt=[*prompt, *mesh.prompt(20)])
    assert answer.plan.generated_on == "b"
    assert answer.num_cached_tokens == 496


@in_memory("data_parallel", Engine("a"), Engine("b"))
async def test_load_is_what_the_test_says(mesh: MeshInMemory) -> None:
    await mesh.occupy("a", num_requests=3)
    answers = [await mesh.ask() for _ in range(2)]
    assert {answer.plan.generated_on for answer in answers} == {"b"}
    assert answers[0].plan.picks == [Picked(None, "b", "load", ("a", "b"))]


@in_memory("data_parallel", Engine("a"), Engine("b"), num_routers=2)
async def test_engines_are_killed_and_come_back(mesh: MeshInMemory) -> None:
    mesh.kill("a")
    for router in (0, 1):
        assert (await mesh.ask(router=router, max_tokens=20)).plan.generated_on == "b"
    mesh.start("a")
    await mesh.joined()
    mesh.drain("b")
    await asyncio.sleep(1.0)
    assert (await mesh.ask()).plan.generated_on == "a"


@in_memory("data_parallel", Engine("a", slowness=10.0))
async def test_time_is_virtual_and_engines_are_as_slow_as_they_are_made(mesh: MeshInMemory) -> None:
    slow = await mesh.ask()
    mesh.slow("a", 1.0)
    began = mesh.now
    await asyncio.sleep(60)
    assert mesh.now == pytest.approx(began + 60)
    fast = await mesh.ask()
    assert slow.total_s > 5 * fast.total_s


@in_memory("data_parallel", Engine("a"))
async def test_a_full_engine_serves_when_there_is_room(mesh: MeshInMemory) -> None:
    mesh.fill("a")
    asking = asyncio.ensure_future(mesh.ask(prompt_tokens=100))
    await asyncio.sleep(1.0)
    assert not asking.done()
    mesh.empty("a")
    assert (await asking).is_good


@in_memory("in_turn.py", Engine("a"), Engine("b"))
async def test_a_client_that_leaves_and_messages_that_are_late(mesh: MeshInMemory) -> None:
    mesh.late(0.5)
    left = await mesh.ask(max_tokens=1000, leave_after_s=0.2)
    assert left.reason == "abort"
    assert (await mesh.ask()).is_good
    assert mesh.state()["turns"]


def test_a_file_may_have_the_name_of_a_shipped_strategy(tmp_path: Path) -> None:
    (tmp_path / "sticky.py").write_text(
        "from microserve.services.router.authoring import strategy\n\n@strategy\n"
        "async def sticky(mesh, request):\n"
        "    mesh.note('mine')\n    yield mesh.pick(None, request).start_generate(request)\n"
    )
    with MeshInMemory(tmp_path / "sticky.py") as mesh:
        assert mesh.run(mesh.ask()).plan.notes == [("mine", {})]


@strategy
async def mistaken(mesh: Mesh, request: Request) -> Chunks:
    async for tokens in mesh.pick(None, request).start_generate(request):
        yield Tokens(tokens.offset, [token + 1 for token in tokens.token_ids], finished=tokens.finished)


def test_a_mesh_that_cannot_be_is_refused_and_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="two engines of one name"):
        MeshInMemory("balanced", Engine("a"), Engine("a"))
    monkeypatch.setattr(mesh_in_memory, "JOIN_S", 0.0)
    before = structlog.get_config()
    with pytest.raises(AssertionError, match="does not come together"), MeshInMemory("balanced"):
        pass
    assert structlog.get_config() == before


def test_a_mistake_fails_the_test_with_its_line_though_the_client_is_served() -> None:
    @in_memory(mistaken)
    async def story(mesh: MeshInMemory) -> None:
        assert (await mesh.ask()).is_good

    with pytest.raises(AssertionError, match=r"test_in_memory\.py:\d+: .*tokens that no engine gave"):
        story()

    @in_memory(mistaken, may_be_mistaken=True)
    async def lenient(mesh: MeshInMemory) -> None:
        assert (await mesh.ask()).is_good
        assert len(mesh.mistakes) == 1

    lenient()


def test_the_runner_passes_the_other_arguments(tmp_path: Path) -> None:
    folder = tmp_path.name

    @in_memory("data_parallel")
    async def story(mesh: MeshInMemory, tmp_path: Path, number: int = 3) -> None:
        assert (await mesh.ask()).plan.generated_on == "e0"
        assert (tmp_path.name, number) == (folder, 5)

    assert [*inspect.signature(story).parameters] == ["tmp_path", "number"]
    story(tmp_path, number=5)


def test_a_mesh_is_a_fixture_of_pytest_too(make_mesh: MakeMesh) -> None:
    mesh = make_mesh("balanced", *PAIR)
    assert mesh.run(mesh.ask(prompt_tokens=100)).plan.sends == [Send("p", "d", 0, 90)]
