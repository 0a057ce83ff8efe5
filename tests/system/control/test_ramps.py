"""A canary that goes on by itself on a mesh of real processes, through the kill of a router; how it does is
told by the command, in metrics and in the heads of streams."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from microserve.protocol.bus.transport import ZmqBus
from microserve.protocol.errors import MeshError
from microserve.services.command.shared.control_client import ControlClient
from tests.support.process.processes import MeshProcesses
from tests.support.router.swaps import source

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

HEARTBEAT_S = 0.2


def run(mesh: MeshProcesses, *words: str) -> str:
    command = [sys.executable, "-P", "-m", "microserve.services", "strategy", *words]
    done = subprocess.run(
        [*command, "--index", mesh.index_address], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


async def asked(http: httpx.AsyncClient, number: int) -> str:
    """The version that served a stream, by its head."""
    body = {"model": "tiny", "prompt": f"request {number}", "max_tokens": 4, "stream": True}
    headers = {"x-microserve-strategy": "mine"}
    async with http.stream("POST", "/v1/completions", json=body, headers=headers) as reply:
        text = "".join([part async for part in reply.aiter_text()])
    assert reply.status_code == 200
    assert text.rstrip().endswith("[DONE]"), text
    assert reply.headers["x-microserve-strategy"] == "mine"
    assert reply.headers["x-microserve-engines"] == "engine-0"
    return str(reply.headers["x-microserve-strategy-version"])


async def promoted(mesh: MeshProcesses, version: int) -> set[str]:
    """Ask until the canary is promoted, while a router is killed and started; the versions that served."""
    bus, served = ZmqBus(linger_s=0.1), set()
    control = ControlClient(bus, mesh.index_address)
    try:
        base = f"http://127.0.0.1:{mesh.gateway_port}"
        async with httpx.AsyncClient(base_url=base, timeout=60) as http, asyncio.timeout(120):
            for number in range(1_000_000):
                served.add(await asked(http, number))
                if number == 30:
                    mesh.services["router-1"].kill()
                    await asyncio.to_thread(mesh.start, "router-1")
                with suppress(MeshError):
                    [entry] = (await control.report()).state.entries
                    if entry.canary is None:
                        assert entry.stable is not None and entry.stable.version == version
                        return served
            return served
    finally:
        control.close()
        bus.close()


def test_a_ramp_goes_up_through_the_kill_of_a_router_and_all_of_it_is_told(
    tiny_model: Path, tmp_path: Path
) -> None:
    settings = [f"index.control_path={tmp_path / 'control.db'}", f"bus.heartbeat_interval_s={HEARTBEAT_S}"]
    old, new = tmp_path / "old.py", tmp_path / "new.py"
    old.write_text(source(0))
    new.write_text(source(2))
    with MeshProcesses(
        tiny_model, tmp_path, num_engines=1, num_routers=2, gateway=True, settings=settings
    ) as mesh:
        run(mesh, "publish", str(old), "--name", "mine", "--no-dry-run")
        ramp = ["--ramp", "20%,50%,100%", "--every", "1s", "--min-requests", "5"]
        run(mesh, "publish", str(new), "--name", "mine", "--no-dry-run", *ramp)
        assert "ramp    20%, 50%, 100%" in run(mesh, "show", "mine")
        compared = json.loads(run(mesh, "compare", "mine", "-o", "json"))
        assert set(compared["measures"]) == {"TTFT", "TPOT", "JCT", "failures"}
        assert asyncio.run(promoted(mesh, 2)) == {"1", "2"}
        history = run(mesh, "history", "mine")
        assert [line.split()[3] for line in history.splitlines()[:2]] == ["promote", "share"]
        shown = run(mesh, "show", "mine")
        assert "requests, none failed" in shown
        assert any(line.split()[:2] == ["canary", "2"] for line in shown.splitlines())
        metrics = httpx.get(f"http://127.0.0.1:{mesh.gateway_port}/metrics", timeout=30).text
        found: Counter[tuple[str, str]] = Counter()
        for family in text_string_to_metric_families(metrics):
            for sample in family.samples:
                if sample.name == "microserve_strategy_requests_total":  # a row for each result
                    found[sample.labels["version"], sample.labels["share"]] += int(sample.value)
        assert found["1", "stable"] > 0 and found["2", "canary"] >= 10
