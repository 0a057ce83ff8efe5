"""What the page says of a request is what its client waited: phases that add up, under every strategy and
whatever happens to it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.process import stopwatch
from tests.support.process.exactness import STRATEGIES
from tests.support.process.processes import MeshProcesses
from tests.support.process.stopwatch import Order, Took

pytestmark = [pytest.mark.system, pytest.mark.heavy, pytest.mark.timeout(600)]

NUM_REQUESTS = 200
WIDTH = 2
"""Requests at a time."""
LONG = 2500
KILLED, MOVED, LEFT = 63, (110, 140), (20, 75, 120, 165)
"""Orders whose engine is killed or leaves, and those whose client does, in their midst."""
ABS_S, REL = 2e-3, 0.01
"""What the page may be away from what the client measured."""
MAX_LATE = 4
"""Requests that are further away, by no more than the client says of its own lag."""


def orders() -> Iterator[Order]:
    for number in range(NUM_REQUESTS):
        strategy = STRATEGIES[number % len(STRATEGIES)]
        length = (40, 300, 700, 1200)[number // 3 % 4]
        body: dict[str, Any] = {
            "model": "tiny",
            "prompt": [20 + (number // 5 * 31 + place * 7) % 200 for place in range(length)],
            "max_tokens": (1, 8, 24, 60)[number % 4],
            "ignore_eos": True,
            "stream": number % 3 > 0,
        }
        order = Order(
            id=f"timed-{number}",
            path="/v1/completions",
            headers={"x-microserve-strategy": strategy},
            body=body,
            signal=0,
            leaves=number in LEFT,
        )
        if number % 6 == 1:
            body["stream_options"] = {"include_usage": True}
        if number % 7 == 2:
            body |= {"n": 2}
        if number % 11 == 5:
            text = "and again " * (length // 10)
            order["path"] = "/v1/chat/completions"
            body |= {"messages": [{"role": "user", "content": text}], "stop": ["qq"]}
            del body["prompt"]
        if number == KILLED or number in (*MOVED, *LEFT):
            body |= {"prompt": body["prompt"][:40], "max_tokens": LONG, "stream": True, "n": 1}
            order["headers"]["x-microserve-strategy"] = "data_parallel"
            order["signal"] = {KILLED: signal.SIGKILL}.get(number, 0 if number in LEFT else signal.SIGTERM)
        yield order


def test_phases_add_up_to_what_the_client_waited(tiny_model: Path, tmp_path: Path) -> None:
    """No process can count how long it had no processor while the kernel held its bytes, so the gateway and
    the client go before all others; what the client waited for one nonetheless it says itself."""
    settings = ["model.name=tiny", "kvcache.checksums=false"]
    with MeshProcesses(tiny_model, tmp_path, num_engines=5, gateway=True, settings=settings) as mesh:
        _put_first(mesh.services["gateway"].process.pid)
        took = _measured(mesh)
        told = _told(mesh, took)
        _assert_faults(mesh)
    differences_s = {name: told[name] - each["wall_s"] for name, each in took.items()}
    late: list[str] = []
    outside: list[str] = []
    for name, each in took.items():
        beyond_s = abs(differences_s[name]) - (ABS_S + REL * each["wall_s"])
        if beyond_s > 0.0:
            line = (
                f"{name}: page {told[name]:.6f} s, client {each['wall_s']:.6f} s, lag {each['lag_s']:.6f} s"
            )
            (late if beyond_s <= each["lag_s"] else outside).append(line)
    ordered = sorted(abs(each) * 1e3 for each in differences_s.values())
    print(
        f"{len(took)} requests, {sum(each['wall_s'] for each in took.values()):.1f} s; page and client"
        f" differ by {ordered[len(ordered) // 2]:.2f} ms in the middle, {ordered[-3]:.2f} ms in 99 % of them,"
        f" {ordered[-1]:.2f} ms at most; {len(late)} outside by the client's own lag: {late}"
    )
    assert not outside, (outside, ordered)
    assert len(late) <= MAX_LATE, late


def _put_first(pid: int) -> None:
    try:
        os.sched_setscheduler(pid, os.SCHED_RR, os.sched_param(1))
    except PermissionError:
        pytest.skip("needs to put a process before all others (CAP_SYS_NICE)")


def _measured(mesh: MeshProcesses) -> dict[str, Took]:
    """By the client, of all orders; faults happen where they are to."""
    pids = {name: each.process.pid for name, each in mesh.services.items() if name.startswith("engine")}
    command = [sys.executable, "-S", stopwatch.__file__, "127.0.0.1", str(mesh.gateway_port), str(WIDTH)]
    with subprocess.Popen(
        [*command, json.dumps(pids)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as client:
        _put_first(client.pid)
        lines, _ = client.communicate("".join(json.dumps(order) + "\n" for order in orders()), timeout=200)
    found: dict[str, Took] = {took["id"]: took for took in map(json.loads, lines.splitlines())}
    assert client.returncode == 0
    assert len(found) == NUM_REQUESTS
    return found


def _told(mesh: MeshProcesses, took: Mapping[str, Took]) -> dict[str, float]:
    """By the page: the sum of the phases, of several choices those of the one that ended last."""
    with httpx.Client(base_url=mesh.gateway_url, timeout=60) as client:
        ended = client.get("/view/requests", params={"limit": 1000}).json()["ended"]
        sums: dict[str, float] = {}
        for name, choice in ((form["http_id"], form["id"]) for form in ended):
            detail = client.get(f"/view/requests/{choice}").json()
            assert detail["request"]["id"] == choice
            sums[name] = max(sums.get(name, 0.0), sum(part["seconds"] for part in detail["timeline"]))
    assert sums.keys() == took.keys()
    return sums


def _assert_faults(mesh: MeshProcesses) -> None:
    """They happened in the midst of the requests that they were meant for."""

    def detail(number: int) -> dict[str, Any]:
        answer = httpx.get(f"{mesh.gateway_url}/view/requests/timed-{number}", timeout=60)
        found: dict[str, Any] = answer.json()
        return found

    assert [detail(number)["request"]["finish_reason"] for number in LEFT] == ["abort"] * len(LEFT)
    assert [detail(number)["request"]["moves"] for number in MOVED] == [1] * len(MOVED)
    [record] = detail(KILLED)["records"]
    assert (record["num_attempts"] > 1, record["code"]) == (True, "")
