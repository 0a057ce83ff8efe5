"""The self-check between real engines: it passes; and a transfer at fault is found, told of, kept out of
answers by every router, and taken back into use when it is well again."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from microserve.protocol import log
from tests.support.process.nursery import Process
from tests.support.process.processes import LEASH, MeshProcesses, free_port
from tests.support.security.up_mesh import up_mesh
from tests.system.running.test_metrics import scrape, total

pytestmark = [pytest.mark.system, pytest.mark.timeout(400)]

ROUTERS = ("router", "router-1")
PAIRS = {("engine-0", "engine-1"), ("engine-1", "engine-0")}
TIMEOUT_S = 90.0


def eventually(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + TIMEOUT_S
    while not (found := condition()):
        assert time.monotonic() < deadline, f"did not come true: {what}"
        time.sleep(0.05)
    return found


@dataclass
class CheckedMesh(MeshProcesses):
    """Its last engine is at fault while ``switch`` exists."""

    switch: Path = Path()

    def spawn(self, name: str, arguments: list[str], log: Path) -> Process:
        if name != "engine-1":
            return super().spawn(name, arguments, log)
        module = "tests.support.engine.misplacing_engine"
        command = [sys.executable, "-S", "-E", str(LEASH), str(os.getpid()), sys.executable, "-m", module]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(Path.cwd()), *sys.path])),
        }
        with log.open("w") as sink:
            return subprocess.Popen(
                [*command, str(self.switch), *arguments], stdout=sink, stderr=sink, env=environment, text=True
            )


@contextmanager
def checked_mesh(model: Path, directory: Path) -> Iterator[tuple[CheckedMesh, httpx.Client, dict[str, int]]]:
    """Two routers that check all the time; a client of the gateway; where each service is measured."""
    ports = {name: free_port() for name in (*ROUTERS, "index")}
    mesh = CheckedMesh(
        model,
        directory,
        num_routers=2,
        gateway=True,
        # With checksums it would be found on the way; this is about what they do not see.
        settings=["router.check_interval_s=0.3", "kvcache.checksums=false"],
        own_settings={
            "router": [f"router.metrics_port={ports['router']}"],
            "router-1": [f"router.metrics_port={ports['router-1']}"],
            "index": [f"index.metrics_port={ports['index']}"],
        },
        switch=directory / "at fault",
    )
    with mesh, httpx.Client(base_url=mesh.gateway_url, timeout=120) as http:
        eventually(lambda: http.get("/ready").status_code == 200, "the mesh is ready")
        yield mesh, http, ports


def ask(http: httpx.Client, first: int, strategy: str) -> str:
    body = {"model": "tiny", "prompt": [first, *range(30, 90)], "max_tokens": 12, "ignore_eos": True}
    body |= {"temperature": 0.0}
    reply = http.post("/v1/completions", json=body, headers={"x-microserve-strategy": strategy})
    assert reply.status_code == 200, reply.text
    return str(reply.json()["choices"][0]["text"])


def engines_of_last(http: httpx.Client, count: int) -> list[list[str]]:
    ended = http.get("/view/requests", params={"limit": count}).json()["ended"]
    return [each["engines"] for each in ended]


def events(mesh: MeshProcesses, event: str) -> list[dict[str, object]]:
    return [each for name in ROUTERS for each in mesh.events(name) if each.get("event") == event]


def alarms(http: httpx.Client) -> list[str]:
    told = http.get("/view/health").json()["alarms"]
    return [each["subject"] for each in told if each["name"] == "check.differs"]


def suspects(ports: dict[str, int]) -> list[float]:
    """As every service that counts them says."""
    told = [(name, scrape(f"127.0.0.1:{port}")) for name, port in ports.items()]
    kinds = {name: "index" if name == "index" else "router" for name, _ in told}
    return [total(found, f"microserve_{kinds[name]}_suspects") for name, found in told]


def test_a_transfer_at_fault_is_found_and_kept_out_of_answers(tiny_model: Path, tmp_path: Path) -> None:
    with checked_mesh(tiny_model, tmp_path) as (mesh, http, ports):

        def equal() -> bool:
            checks = http.get("/view/health").json()["checks"]
            assert all(each["outcome"] != "differs" for each in checks)
            return {(c["source"], c["target"]) for c in checks if c["outcome"] == "equal"} == PAIRS

        eventually(equal, "both ways are checked and equal")
        assert {each["compared"] for each in http.get("/view/health").json()["checks"]} == {"bits"}
        for name in ROUTERS:
            found = scrape(f"127.0.0.1:{ports[name]}")
            assert total(found, "microserve_router_checks_total", outcome="equal") > 0, "they share the work"
            assert total(found, "microserve_router_check_tokens_total") > 0
            assert total(found, "microserve_router_check_seconds_total") > 0
            assert total(found, "microserve_router_check_age_seconds") < TIMEOUT_S
        truth = [ask(http, 100 + number, "data_parallel") for number in range(8)]
        assert [ask(http, 100 + number, "disaggregated") for number in range(8)] == truth
        assert {len(each) for each in engines_of_last(http, 8)} == {2}
        assert not alarms(http)

        mesh.switch.touch()
        eventually(lambda: alarms(http) == ["engine-1 → engine-0"], "the page has an alarm")
        eventually(lambda: suspects(ports) == [1.0, 1.0, 1.0], "both routers and the index know")
        differing = events(mesh, log.CHECK_DIFFERS)
        assert {(each["source"], each["target"]) for each in differing} == {("engine-1", "engine-0")}
        assert {each["differs"] for each in differing} == {"transferred"}
        for strategy in ("disaggregated", "balanced", "migrate"):
            told = [ask(http, 120 + number, strategy) for number in range(8)]
            used = engines_of_last(http, 8)  # a receiver stands before its sender
            assert ["engine-0", "engine-1"] not in used, "no KV goes there, by no router"
            assert strategy != "disaggregated" or {len(each) for each in used} == {1}
            assert told == [ask(http, 120 + number, "data_parallel") for number in range(8)]

        mesh.switch.unlink()
        eventually(lambda: not alarms(http), "the alarm is over")
        eventually(lambda: suspects(ports) == [0.0, 0.0, 0.0], "all know")
        assert events(mesh, log.CHECK_PASSED)
        told = [ask(http, 140 + number, "disaggregated") for number in range(8)]
        assert {len(each) for each in engines_of_last(http, 8)} == {2}, "they work together again"
        assert told == [ask(http, 140 + number, "data_parallel") for number in range(8)]


def test_a_mesh_of_up_checks_itself(tiny_model: Path) -> None:
    with up_mesh(tiny_model, "router.check_interval_s=0.5") as mesh:
        with httpx.Client(base_url=mesh.state.url, timeout=120) as http:

            def both_are_equal() -> bool:
                checks = http.get("/view/health").json()["checks"]
                return [each["outcome"] for each in checks] == ["equal", "equal"]

            eventually(both_are_equal, "both ways are checked")
            assert not alarms(http)
        shown = mesh.run("top", "--once")
        assert shown.returncode == 0, shown.stderr
        assert "check ok" in shown.stdout
