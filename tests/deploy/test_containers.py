"""Dockerfile and compose.yaml: linted, held against what the project has, and run as processes.

There is no container engine where these tests run: that the image builds is *not* shown here.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import httpx
import pytest
import yaml

from microserve.protocol.settings.settings import Settings
from microserve.protocol.settings.sources import load_settings
from microserve.services.command.main import main
from microserve.services.local import leash
from tests.support.process.processes import free_port

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
BIN = Path(sys.executable).parent
HOME = "/var/lib/microserve"
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = [name for name, service in SERVICES.items() if "entrypoint" not in service]
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()


def lint(path: Path) -> str:
    done = subprocess.run(
        [str(BIN / "hadolint"), "--no-color", str(path)], capture_output=True, text=True, check=False
    )
    return done.stdout + done.stderr


def validate(path: Path) -> int:
    command = [str(BIN / "check-jsonschema"), "--builtin-schema", "vendor.compose-spec", str(path)]
    return subprocess.run(command, capture_output=True, check=False).returncode


def test_the_linter_has_nothing_to_say_and_would_have(tmp_path: Path) -> None:
    assert lint(DEPLOY / "Dockerfile") == ""
    (tmp_path / "Dockerfile").write_text(DOCKERFILE.replace("USER 10001", "USER root"))
    assert "DL3002" in lint(tmp_path / "Dockerfile")


def test_compose_follows_its_schema_which_can_fail(tmp_path: Path) -> None:
    assert validate(DEPLOY / "compose.yaml") == 0
    (tmp_path / "compose.yaml").write_text((DEPLOY / "compose.yaml").read_text().replace("ports:", "prots:"))
    assert validate(tmp_path / "compose.yaml") == 1


def test_the_image_copies_what_the_wheel_is_made_of() -> None:
    copied = {
        word for line in re.findall(r"^COPY (?!--)(.*)$", DOCKERFILE, re.M) for word in line.split()[:-1]
    }
    linked = {path.name for path in (ROOT / ".src/microserve").iterdir()}
    assert copied == linked | {".src", "pyproject.toml", "README.md", "LICENSE", "tooling/wheel_hook.py"}
    assert all((ROOT / name).exists() for name in copied)
    assert f"VOLUME {HOME}\n" in DOCKERFILE
    assert "\nUSER 10001\n" in DOCKERFILE
    assert 'ENTRYPOINT ["microserve"]' in DOCKERFILE


def test_everybody_shares_the_pods_namespaces_and_only_the_gateway_is_published() -> None:
    assert OURS == ["index", "engine-0", "engine-1", "router", "gateway"]
    for name in OURS:
        assert SERVICES[name]["network_mode"] == SERVICES[name]["pid"] == "service:pod", name
        assert SERVICES[name]["volumes"] == [f"mesh_data:{HOME}"]
    (published,) = SERVICES["pod"]["ports"]
    assert published.split(":")[-1] == str(Settings().gateway.port)
    assert set(COMPOSE["volumes"]) == {"mesh_data"}
    assert not [name for name, service in SERVICES.items() if name != "pod" and "ports" in service]


@pytest.mark.parametrize("name", OURS)
def test_each_command_and_setting_exists(name: str) -> None:
    service = SERVICES[name]
    command, *words = service["command"]
    found = main.get_command(click.Context(main), command)
    assert found is not None
    flags = {flag for parameter in found.params for flag in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= flags
    assigned = [after for word, after in itertools.pairwise(words) if word == "--set"]
    settings = load_settings(environment=service["environment"], overrides=assigned)
    assert settings.model.path == f"{HOME}/model"
    assert settings.index.address.rpartition(":")[2] in " ".join(SERVICES["index"]["healthcheck"]["test"])
    assert settings.router.address.rpartition(":")[2] in " ".join(SERVICES["router"]["healthcheck"]["test"])
    if command == "engine":
        assert int(service["stop_grace_period"].removesuffix("s")) > settings.engine.drain_s


@pytest.fixture
def port(tiny_model: Path, tmp_path: Path) -> Iterator[int]:
    """The mesh of compose.yaml as processes: its commands and environment, other ports and home."""
    (tmp_path / "model").symlink_to(tiny_model)
    gateway_port = free_port()
    own = {
        "MICROSERVE_INDEX__ADDRESS": f"tcp://127.0.0.1:{free_port()}",
        "MICROSERVE_ROUTER__ADDRESS": f"tcp://127.0.0.1:{free_port()}",
    }
    making = [*SERVICES["keys"]["entrypoint"][1:], *SERVICES["keys"]["command"]]
    making = [word.replace(HOME, str(tmp_path)) for word in making]
    subprocess.run([sys.executable, "-P", "-m", "microserve.services", *making], check=True)
    tied = [sys.executable, "-S", "-E", str(leash.__file__), str(os.getpid())]
    started = []
    try:
        for name in OURS:
            words = [word.replace("=8000", f"={gateway_port}") for word in SERVICES[name]["command"]]
            given = {
                key: text.replace(HOME, str(tmp_path)) for key, text in SERVICES[name]["environment"].items()
            }
            with (tmp_path / f"{name}.log").open("w") as log:
                process = subprocess.Popen(
                    [*tied, sys.executable, "-P", "-m", "microserve.services", *words],
                    env={**os.environ, **given, **own},
                    stdout=log,
                    stderr=log,
                )
            started.append(process)
        yield gateway_port
        codes = []
        for process in reversed(started):
            process.terminate()
            codes.append(process.wait(30))
        assert codes == [0] * len(OURS)
    finally:
        for process in started:
            process.kill()
            process.wait(10)


@pytest.mark.system
def test_the_commands_make_a_mesh_whose_engines_reach_each_other(port: int) -> None:
    kind, _, *check = SERVICES["gateway"]["healthcheck"]["test"]
    assert kind == "CMD"
    healthy = [sys.executable, *(word.replace(":8000", f":{port}") for word in check)]
    deadline = time.monotonic() + 120
    while subprocess.run(healthy, capture_output=True, check=False).returncode:
        assert time.monotonic() < deadline, "the gateway's healthcheck never passes"
    body = {"model": SERVICES["gateway"]["environment"]["MICROSERVE_MODEL__NAME"], "prompt": "x" * 40}
    answer = httpx.post(
        f"http://127.0.0.1:{port}/v1/completions",
        json={**body, "max_tokens": 4},
        headers={"x-microserve-strategy": "disaggregated"},
        timeout=60,
    )
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] > 0
