"""Strategies that hang on meshes of real processes: their clients are served late, others notice nothing."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from microserve.services.local.demo.request import Gateway
from microserve.services.local.directory import MeshDirectory
from tests.support.process.processes import MeshProcesses
from tests.system.running.test_up import TIMEOUT_S, flags, restarted, run

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]

HEAD = """
from microserve.services.router.authoring import strategy

def forever(*_):
    while True:
        pass

@strategy
async def hog(mesh, request):
    {body}
    async for tokens in mesh.pick(None, request).start_generate(request):
        yield tokens
"""
HANGS = {
    "in calls of mesh": "while True: mesh.load(mesh.pick('decode', request))",
    "in a cost": "mesh.pick(None, request, cost=forever)",
    "in a task that catches": (
        "import asyncio\n    async def f():\n        while True:\n            try: forever()\n"
        "            except BaseException: pass\n    await asyncio.create_task(f())"
    ),
}
RATE_PER_S = 12.0
LOAD_S = 7.0
"""For each of them."""


async def load(
    client: httpx.AsyncClient, strategy: str, rate_per_s: float, seconds: float
) -> list[tuple[httpx.Response, float]]:
    """Requests at a steady rate; each answer with the seconds that it took."""

    async def ask() -> tuple[httpx.Response, float]:
        began = time.monotonic()
        body = {"model": "tiny", "prompt": "Hello", "max_tokens": 4, "temperature": 0}
        answer = await client.post("/v1/completions", json=body, headers={"x-microserve-strategy": strategy})
        return answer, time.monotonic() - began

    async with asyncio.TaskGroup() as tasks:
        asked = []
        for _ in range(int(rate_per_s * seconds)):
            asked.append(tasks.create_task(ask()))
            await asyncio.sleep(1 / rate_per_s)
    return [task.result() for task in asked]


def publish(index: str, path: Path, body: str, cwd: Path) -> None:
    path.write_text(HEAD.format(body=body))
    done = run("strategy", "publish", str(path), "--no-dry-run", "--index", index, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.heavy
def test_load_on_another_strategy_loses_nothing(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One router for all: it stands for half a second with each, which is nothing to its gateway."""

    async def main(mesh: MeshProcesses) -> tuple[list[float], list[float]]:
        url = f"http://127.0.0.1:{mesh.gateway_port}"
        others: list[float] = []
        hogs: list[float] = []
        async with httpx.AsyncClient(base_url=url, timeout=60.0) as client:
            expected = (await load(client, "data_parallel", 1, 1))[0][0].json()["choices"][0]["text"]
            for body in HANGS.values():
                await asyncio.to_thread(publish, mesh.index_address, tmp_path / "hog.py", body, tmp_path)
                both = await asyncio.gather(
                    load(client, "data_parallel", RATE_PER_S, LOAD_S), load(client, "hog", 2, LOAD_S - 2)
                )
                for answers, times in zip(both, (others, hogs), strict=True):
                    assert [answer.status_code for answer, _ in answers] == [200] * len(answers)
                    assert {answer.json()["choices"][0]["text"] for answer, _ in answers} == {expected}
                    times += [seconds for _, seconds in answers]
        return others, hogs

    settings = ["model.name=tiny", f"index.control_path={tmp_path / 'control.db'}"]
    with MeshProcesses(tiny_model, tmp_path, gateway=True, settings=settings) as mesh:
        others, hogs = asyncio.run(main(mesh))
        assert len(others) >= 238
        told = [event for event in mesh.events("router") if event["event"] == "strategy.failed"]
        assert len(told) >= len(HANGS)
    with capsys.disabled():
        print(f"\n{len(others)} of others, longest {max(others):.2f} s")
        print(f"{len(hogs)} of its own, longest {max(hogs):.2f} s")


@pytest.fixture
def watched(tiny_model: Path, tmp_path: Path) -> Iterator[MeshDirectory]:
    settings = [*flags(tiny_model), "--set", "mesh.watchdog_s=4"]
    started = run("up", "--detach", "--no-demo", "--engines", "1", *settings, cwd=tmp_path)
    mesh = MeshDirectory(tmp_path / ".microserve")
    try:
        assert started.returncode == 0, started.stdout + started.stderr
        yield mesh
    finally:
        if pid := mesh.supervisor():
            os.kill(pid, signal.SIGTERM)
            psutil.Process(pid).wait(TIMEOUT_S)


def address_of(mesh: MeshDirectory, name: str) -> str:
    state = mesh.read()
    assert state is not None
    return next(child.address for child in state.children if child.name == name)


@pytest.mark.heavy
def test_a_router_that_cannot_go_on_is_started_again_and_keeps_away_from_what_stopped_it(
    watched: MeshDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    """Code in C that never asks for signals: only the watchdog of ``up`` ends it."""
    cwd, state = watched.root.parent, watched.read()
    assert state is not None
    index = address_of(watched, "index")
    publish(index, cwd / "hog.py", "sum(range(10**13))", cwd)
    body = {"model": "tiny", "prompt": "Hello", "max_tokens": 4}

    async def ask(strategy: str) -> httpx.Response:
        async with httpx.AsyncClient(base_url=state.url, timeout=60.0) as client:
            return await client.post(
                "/v1/completions", json=body, headers={"x-microserve-strategy": strategy}
            )

    async def main() -> float:
        began = time.monotonic()
        first = asyncio.create_task(ask("hog"))
        await asyncio.wait_for(restarted(watched, "router"), TIMEOUT_S)
        took_s = time.monotonic() - began
        await first
        await Gateway.at(state.url).until_ready(TIMEOUT_S)
        assert (await ask("hog")).status_code == 200
        assert (await ask("data_parallel")).status_code == 200
        return took_s

    took_s = asyncio.run(main())
    history = run("strategy", "history", "--index", index, cwd=cwd).stdout
    assert re.search(r"rollback hog .*its code stopped a router for good", history), history
    after = watched.read()
    assert after is not None
    assert {child.name: child.restarts for child in after.children if child.restarts} == {"router": 1}
    with capsys.disabled():
        print(f"\na router that stood still was back after {took_s:.1f} s (mesh.watchdog_s=4)")


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["index", "router", "gateway"])
def test_every_service_of_up_that_stands_still_is_started_again(watched: MeshDirectory, name: str) -> None:
    state = watched.read()
    assert state is not None
    os.kill(next(child.pid for child in state.children if child.name == name), signal.SIGSTOP)
    asyncio.run(asyncio.wait_for(restarted(watched, name), TIMEOUT_S))
    asyncio.run(asyncio.wait_for(Gateway.at(state.url).until_ready(TIMEOUT_S), TIMEOUT_S))
    body = {"model": "tiny", "prompt": "Hello", "max_tokens": 4}
    assert httpx.post(f"{state.url}/v1/completions", json=body, timeout=60.0).status_code == 200
