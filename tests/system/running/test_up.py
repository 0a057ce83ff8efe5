"""``microserve up`` as a user runs it: one command to an answer, and nothing left behind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from microserve.services.local.demo.request import PROMPT, Answer, Gateway
from microserve.services.local.directory import MeshDirectory
from tests.support.hub.server import Hub, serving

pytestmark = pytest.mark.system

TIMEOUT_S = 150.0
MICROSERVE = [sys.executable, "-P", "-m", "microserve.services"]


def flags(model: Path) -> list[str]:
    """A small mesh on free ports."""
    assignments = [
        f"model.path={model}",
        "model.name=tiny",
        "index.address=tcp://127.0.0.1:0",
        "router.address=tcp://127.0.0.1:0",
        "gateway.port=0",
        "kvcache.num_blocks=64",
        "bus.heartbeat_interval_s=0.2",
    ]
    return [word for each in assignments for word in ("--set", each)]


def run(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*MICROSERVE, *words],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        stdin=subprocess.DEVNULL,
        check=False,
    )


@pytest.fixture
def background(tiny_model: Path, tmp_path: Path) -> Iterator[MeshDirectory]:
    """A mesh left running by ``up --detach``; stopped afterwards, whatever the test did."""
    started = run("up", "--detach", "--engines", "1", *flags(tiny_model), cwd=tmp_path)
    mesh = MeshDirectory(tmp_path / ".microserve")
    try:
        assert started.returncode == 0, started.stdout + started.stderr
        assert "microserve down" in started.stdout
        assert "microserve chat" in started.stdout
        yield mesh
    finally:
        if pid := mesh.supervisor():
            os.kill(pid, signal.SIGKILL)
            psutil.Process(pid).wait(TIMEOUT_S)


def test_oneshot_answers_and_stops(tiny_model: Path, tmp_path: Path) -> None:
    done = run("up", "--oneshot", "--json", *flags(tiny_model), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    answered = next(event for event in events if event["event"] == "answered")
    assert answered["num_tokens"] > 0
    last = [event for event in events if event["event"] == "mesh"][-1]
    assert {child["state"] for child in last["children"]} == {"stopped"}
    pids = {child["pid"] for event in events for child in event.get("children", [])} - {0}
    assert len(pids) == 5
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert MeshDirectory(tmp_path / ".microserve").supervisor() == 0


def test_plain_output_reads_well(tiny_model: Path, tmp_path: Path) -> None:
    done = run("up", "--oneshot", "--engines", "1", *flags(tiny_model), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\x1b" not in done.stdout
    for text in (
        "engine-e0    ready",
        "gateway      ready",
        f"> {PROMPT}",
        "tokens; the first after",
        "stopped",
    ):
        assert text in done.stdout
    log = run("tail", cwd=tmp_path)
    assert log.returncode == 0
    (request,) = [line for line in log.stdout.splitlines() if " | tiny | " in line]
    assert "queued " in request
    assert "decoded " in request


def test_detached_mesh_serves_survives_a_crash_and_is_stopped(background: MeshDirectory) -> None:
    cwd = background.root.parent
    state = background.read()
    assert state is not None
    listing = run("ps", cwd=cwd)
    assert listing.returncode == 0, listing.stdout
    assert listing.stdout.count(" ready ") == 4

    second = run("up", "--no-demo", "--set", f"model.path={cwd}", cwd=cwd)
    assert second.returncode == 1
    assert f"a mesh runs here already, under process {state.pid}" in second.stderr

    engine = next(child for child in state.children if child.name == "engine-e0")
    os.kill(engine.pid, signal.SIGKILL)
    asyncio.run(asyncio.wait_for(restarted(background, "engine-e0"), TIMEOUT_S))
    assert asyncio.run(ask(Gateway.at(state.url))).num_tokens > 0

    pids = [child.pid for child in state.children]
    stopped = run("down", cwd=cwd)
    assert (stopped.returncode, stopped.stdout) == (0, "stopped\n")
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert run("ps", cwd=cwd).returncode == 1


def test_a_client_s_request_id_shows_all_services_lines(background: MeshDirectory) -> None:
    state = background.read()
    assert state is not None
    asyncio.run(Gateway.at(state.url).until_ready(TIMEOUT_S))
    body = {"model": "tiny", "prompt": "Hello", "max_tokens": 4}
    asked = httpx.post(f"{state.url}/v1/completions", json=body, headers={"x-request-id": "mine-7"})
    assert (asked.status_code, asked.headers["x-request-id"]) == (200, "mine-7")
    for wanted in ("mine-7", asked.json()["id"]):
        told = run("tail", "--request", wanted, "-o", "json", cwd=background.root.parent)
        lines = [json.loads(line) for line in told.stdout.splitlines()]
        assert {line["service"] for line in lines} == {"gateway", "router", "engine"}, told.stdout
    assert run("tail", "--request", "mine-8", cwd=background.root.parent).stdout == ""


async def restarted(mesh: MeshDirectory, name: str) -> None:
    while True:
        state = mesh.read()
        for child in state.children if state else []:
            if child.name == name and child.restarts and child.state == "ready":
                return
        await asyncio.sleep(0.05)


async def ask(gateway: Gateway) -> Answer:
    await gateway.until_ready(TIMEOUT_S)
    return await gateway.chat("tiny", "Hello!", lambda piece: None)


def test_sighup_is_handed_on_and_ends_nobody(background: MeshDirectory) -> None:
    before = background.read()
    assert before is not None
    os.kill(before.pid, signal.SIGHUP)
    deadline = time.monotonic() + TIMEOUT_S
    for child in before.children:
        while "settings.reloaded" not in (background.root.parent / child.log).read_text():
            assert time.monotonic() < deadline, child.name
            time.sleep(0.05)
    assert background.supervisor() == before.pid
    assert background.read() == before


def test_sigkill_of_up_leaves_no_child(background: MeshDirectory) -> None:
    state = background.read()
    assert state is not None
    children = [psutil.Process(child.pid) for child in state.children]
    os.kill(state.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(children, TIMEOUT_S)
    assert alive == []


def test_ctrl_c_stops_in_order(tiny_model: Path, tmp_path: Path) -> None:
    command = [*MICROSERVE, "up", "--no-demo", "--json", "--engines", "1", *flags(tiny_model)]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        order: list[str] = []
        for line in process.stdout:
            event = json.loads(line)
            if event["event"] == "note" and "try:" in event["text"]:
                process.send_signal(signal.SIGINT)
            for child in event.get("children", []):
                if child["state"] == "stopped" and child["name"] not in order:
                    order.append(child["name"])
    assert process.returncode == 0
    assert order[:2] == ["gateway", "router"]
    assert order[-1] == "index"


def test_a_model_that_is_not_there_is_said_at_once(tmp_path: Path) -> None:
    done = run("up", "--oneshot", *flags(tmp_path / "absent"), cwd=tmp_path)
    assert done.returncode == 2
    assert "model.path" in done.stderr
    assert "config.json" in done.stderr


def test_a_child_that_cannot_start_ends_the_mesh_and_says_why(tiny_model: Path, tmp_path: Path) -> None:
    taken = ["--set", "index.address=tcp://192.0.2.1:7100"]  # an address of no machine (RFC 5737)
    keys = ["--set", f"bus.curve_dir={tmp_path / 'keys'}"]
    assert run("keys", str(tmp_path / "keys"), cwd=tmp_path).returncode == 0
    done = run("up", "--oneshot", *flags(tiny_model), *taken, *keys, cwd=tmp_path)
    assert done.returncode == 1
    assert "index ended with exit code 1: " in done.stderr
    assert "192.0.2.1:7100" in done.stderr
    assert "its log: " in done.stderr


@pytest.mark.heavy
def test_a_model_by_its_name_comes_from_the_hub_once_and_then_needs_no_network(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All services have one snapshot of it, and clients its name."""
    for name in ("HF_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    words = [word for word in flags(tiny_model) if not word.startswith(("model.path", "model.name"))]
    assignments = [word for word in words if word != "--set"]
    rest = [word for each in assignments for word in ("--set", each)]
    command = ["up", "--oneshot", "--json", "--engines", "1", "--model", "org/tiny", *rest]
    hub = Hub()
    hub.add("org/tiny", tiny_model)
    with serving(hub):
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        first = run(*command, cwd=tmp_path)
    for done in (first, run(*command, cwd=tmp_path)):  # the Hub is gone
        assert done.returncode == 0, done.stdout + done.stderr
        events = [json.loads(line) for line in done.stdout.splitlines()]
        assert next(event for event in events if event["event"] == "answered")["num_tokens"] > 0
        assert {event["model"] for event in events if event["event"] == "mesh"} == {"org/tiny"}
    assert any("model.safetensors" in line for line in first.stdout.splitlines())
