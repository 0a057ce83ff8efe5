"""A real Prometheus scrapes a real mesh by scrape.yml as it stands: every expression of every panel finds
something, and a killed engine is an alert."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from microserve.gateway.keys.key import ApiKey, digest_of, entry_of
from tests.support.boards.prometheus import Prometheus, binary, prometheus, wait_for
from tests.support.router.swaps import source
from tests.support.security.up_mesh import UpMesh, up_mesh
from tests.test_packaging import ROOT

pytestmark = pytest.mark.timeout(600)

STRATEGIES = ("auto", "balanced", "disaggregated", "data_parallel", "cache_aware", "migrate", "mine")
BOARDS = {path.stem: json.loads(path.read_text()) for path in (ROOT / "deploy/grafana").glob("*.json")}
AN_ENGINES_DEATH = {"an attempt has failed", "an engine was refused or lost"}


def boards(*words: str) -> str:
    command = [sys.executable, str(ROOT / "tooling/boards.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def resolved(expression: str) -> str:
    """With the values that a board's variables have at first."""
    text = expression.replace("$__rate_interval", "20s")
    return re.sub(r"\$(job|model_name|engine|strategy)\b", ".*", text)


@dataclass(frozen=True)
class Watched:
    mesh: UpMesh
    prometheus: Prometheus


@pytest.fixture(scope="module")
def watched(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """A mesh with keys, whose children stay down; scraped every second, with alerts that wait for nothing."""
    binary("prometheus")
    directory = tmp_path_factory.mktemp("boards")
    keys = directory / "keys.toml"
    entries = (
        ApiKey(name="operator", sha256=(digest_of("operator"),), operator=True),
        ApiKey(name="team", sha256=(digest_of("team"),)),
    )
    keys.write_text("".join(map(entry_of, entries)))
    with up_mesh(tiny_model, f"gateway.api_keys_file={keys}", "mesh.max_restarts=0") as mesh:
        boards("--into", str(mesh.cwd), "--for", "1s")
        folder = mesh.cwd / "deploy/prometheus"
        (folder / "microserve.key").write_text("operator")
        scrape = (folder / "scrape.yml").read_text()
        (folder / "scrape.yml").write_text(scrape.replace("#key# ", "").replace("15s", "1s"))
        with prometheus(folder / "scrape.yml", directory) as running:
            yield Watched(mesh, running)


def ask(mesh: UpMesh, strategy: str, number: int, **fields: Any) -> httpx.Response:
    body = {
        **{"model": "tiny", "prompt": [20 + number % 100, *range(30, 90)]},
        **{"max_tokens": 12, "ignore_eos": True, **fields},
    }
    headers = {"authorization": "Bearer team", "x-microserve-strategy": strategy}
    return httpx.post(f"{mesh.state.url}/v1/completions", json=body, headers=headers, timeout=120)


def leave(mesh: UpMesh) -> None:
    """A client goes after the first words of its answer."""
    headers = {"authorization": "Bearer team"}
    body = {"model": "tiny", "prompt": "long", "max_tokens": 400, "ignore_eos": True, "stream": True}
    url = f"{mesh.state.url}/v1/completions"
    with httpx.stream("POST", url, json=body, headers=headers, timeout=120) as reply:
        next(reply.iter_bytes())


def serve(mesh: UpMesh, number: int) -> None:
    """One of all that boards tell of."""
    for strategy in STRATEGIES:
        reply = ask(mesh, strategy, number)
        assert reply.status_code == 200, reply.text
    ask(mesh, "disaggregated", number, echo=True, logprobs=1)  # one engine alone serves it
    assert ask(mesh, "absent", number).status_code == 404
    leave(mesh)


def publish(mesh: UpMesh) -> None:
    for number, flags in enumerate(([], ["--share", "50%"], ["--shadow", "--share", "100%"])):
        file = mesh.cwd / f"{number}.py"
        file.write_text(source(number))
        words = ["strategy", "publish", str(file), "--name", "mine", "--no-dry-run", *flags]
        done = mesh.run(*words)
        assert done.returncode == 0, done.stdout + done.stderr


def without_data(watched: Watched, asked: list[dict[str, str]]) -> list[dict[str, str]]:
    return [each for each in asked if not watched.prometheus.shows(resolved(each["expression"]))]


def test_every_expression_of_every_panel_finds_something(watched: Watched) -> None:
    listed: list[dict[str, str]] = json.loads(boards("--list"))
    shown = [
        target["expr"]
        for board in BOARDS.values()
        for panel in board["panels"]
        for target in panel.get("targets", [])
    ]
    assert sorted(each["expression"] for each in listed) == sorted(shown)
    before = "microserve_index_control_version == 0"
    wait_for(lambda: watched.prometheus.shows(before), "it is scraped")
    publish(watched.mesh)
    left = [each for each in listed if each["empty_until"] not in AN_ENGINES_DEATH]
    for number in range(1000):
        serve(watched.mesh, number)
        left = without_data(watched, left)
        if not left or number >= 60:
            break
    assert left == []
    targets = watched.prometheus.get("targets")["activeTargets"]
    assert sorted(each["labels"]["id"] for each in targets) == ["e0", "e1", "gateway", "index", "router"]
    assert {(each["health"], each["labels"]["job"]) for each in targets} == {("up", "microserve")}
    for board in BOARDS.values():
        for mark in board["annotations"]["list"]:  # strategies were changed
            assert watched.prometheus.shows(resolved(mark["expr"]))
        for variable in board["templating"]["list"]:
            if variable["type"] == "query":
                found = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]["query"])
                assert found is not None
                series, label = found.groups()
                values = watched.prometheus.get(f"label/{label}/values", **{"match[]": resolved(series)})
                assert values, variable["name"]


def test_nothing_is_wrong_with_a_mesh_that_serves(watched: Watched) -> None:
    [group] = watched.prometheus.get("rules")["groups"]
    assert {rule["health"] for rule in group["rules"]} == {"ok"}
    # What fires after a second may be what passes; and how late a loop is, is this machine's affair.
    wait_for(lambda: not watched.prometheus.firing().keys() - {"MicroserveLoopLag"}, "nothing fires")


def test_a_killed_engine_is_an_alert_and_so_is_the_last_one(watched: Watched) -> None:
    mesh, children = watched.mesh, {child.name: child.pid for child in watched.mesh.state.children}
    body = {"model": "tiny", "prompt": "long", "max_tokens": 800, "ignore_eos": True, "stream": True}
    headers = {"authorization": "Bearer team", "x-microserve-strategy": "data_parallel"}
    url = f"{mesh.state.url}/v1/completions"
    with httpx.stream("POST", url, json=body, headers=headers, timeout=120) as reply:
        one = reply.headers["x-microserve-engines"]
        os.kill(children[f"engine-{one}"], signal.SIGKILL)
        assert reply.read().rstrip().endswith(b"[DONE]"), "the other engine goes on"
    [other] = {"e0", "e1"} - {one}
    wait_for(lambda: "MicroserveEngineGone" in watched.prometheus.firing(), "the engine is missed")
    [gone] = watched.prometheus.firing()["MicroserveEngineGone"]
    summary = "1 engines of microserve are lost and not back: microserve doctor"
    assert gone["annotations"]["summary"] == summary
    wait_for(lambda: "MicroserveUnread" in watched.prometheus.firing(), "nor are its metrics read")
    [unread] = watched.prometheus.firing()["MicroserveUnread"]
    assert unread["labels"]["id"] == one
    listed: list[dict[str, str]] = json.loads(boards("--list"))
    left = [each for each in listed if each["empty_until"] in AN_ENGINES_DEATH]
    wait_for(lambda: not without_data(watched, left), "boards show what has happened")

    os.kill(children[f"engine-{other}"], signal.SIGKILL)
    wait_for(lambda: "MicroserveNoEngine" in watched.prometheus.firing(), "nobody serves")
    with suppress(httpx.HTTPError):
        assert ask(mesh, "auto", 0).status_code == 503
