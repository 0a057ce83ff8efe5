"""Services of another wire version beside a mesh: refused with both numbers, and nobody is harmed.

What a change needs that WIRE.md 8 does not allow is a second mesh, to which the clients are led.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import httpx
import pytest

from microserve.protocol import log
from microserve.protocol.types import WIRE_VERSION
from tests.support.process.processes import MeshProcesses
from tests.support.upgrade.release import RaisedMesh

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(300)]

BODY = {"prompt": list(range(30, 90)), "max_tokens": 16, "temperature": 0.0}


def wait_for(what: str, mesh: MeshProcesses, name: str, text: str) -> None:
    deadline = time.monotonic() + 60
    while not any(text in str(event) for event in mesh.events(name)):
        assert mesh.services[name].process.poll() is None, mesh.services[name].log.read_text()[-2000:]
        assert time.monotonic() < deadline, f"{what}: {mesh.services[name].log.read_text()[-2000:]}"
        time.sleep(0.05)


def ask(mesh: MeshProcesses) -> str:
    answer = httpx.post(
        f"{mesh.gateway_url}/v1/completions", json={"model": mesh.model.name, **BODY}, timeout=60
    )
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


async def ready(mesh: MeshProcesses) -> None:
    async with httpx.AsyncClient() as http, asyncio.timeout(60):
        while (await http.get(f"{mesh.gateway_url}/ready")).status_code != 200:
            await asyncio.sleep(0.05)


def make(kind: type[MeshProcesses], model: Path, directory: Path) -> MeshProcesses:
    directory.mkdir()
    return kind(model, directory, num_engines=1, gateway=True)


def test_who_comes_to_the_wrong_mesh_is_told_and_the_mesh_serves_on(tiny_model: Path, tmp_path: Path) -> None:
    raised = f"wire version {WIRE_VERSION + 1}, expected {WIRE_VERSION}"
    ours = f"wire version {WIRE_VERSION}, expected {WIRE_VERSION + 1}"
    strangers = make(RaisedMesh, tiny_model, tmp_path / "strangers")
    with make(MeshProcesses, tiny_model, tmp_path / "mesh") as mesh, httpx.Client() as http:
        strangers.index_address = mesh.index_address
        try:
            strangers.start("engine-0", wait=False)
            strangers.start("router", wait=False)
            strangers.router_addresses = mesh.router_addresses
            strangers.start("gateway", wait=False)
            for name in ("engine-0", "router", "gateway"):
                wait_for(f"{name} says why", strangers, name, ours)
            wait_for("the index says why", mesh, "index", raised)
            wait_for("the router says why", mesh, "router", raised)
            assert http.get(f"{strangers.gateway_url}/ready").status_code == 503
            first = ask(mesh)
        finally:
            for name in list(strangers.services):
                strangers.stop(name)
        assert ask(mesh) == first
        joined = [event for event in mesh.events("router") if event["event"] == log.ENGINE_JOINED]
        assert len(joined) == 1


def test_a_mesh_of_the_other_version_stands_beside_it_and_takes_over(
    tiny_model: Path, tmp_path: Path
) -> None:
    """The clients are led there one by one; what runs in the old mesh ends in it."""
    with make(MeshProcesses, tiny_model, tmp_path / "before") as before:
        asyncio.run(ready(before))
        first = ask(before)
        with make(RaisedMesh, tiny_model, tmp_path / "after") as after:
            asyncio.run(ready(after))
            assert ask(after) == ask(before) == first
            for name in ("gateway", "router", "engine-0", "index"):
                before.stop(name)
            assert ask(after) == first
