"""Dockerfile and compose.yaml: linted, held against what the project has, and run as processes.

There is no container engine where these tests run: that the image builds is *not* shown here.
"""

from __future__ import annotations

import itertools
import json
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
KEYS = "/etc/microserve/keys"
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


def test_every_target_runs_as_nobody_stops_by_draining_and_says_whether_it_is_well() -> None:
    stages = re.findall(r"^FROM (\S+) AS (\S+)$", DOCKERFILE, re.M)
    assert stages[-2:] == [("base", "cuda"), ("base", "cpu")], (
        "the CPU's is what a build without --target makes"
    )
    base = DOCKERFILE.partition(" AS base")[2]
    assert "\nUSER 10001\n" in base and "USER root" not in base and "\nSTOPSIGNAL SIGTERM\n" in base
    assert f"HEALTH_URL=http://127.0.0.1:{Settings().gateway.port}/health" in base
    assert not re.search(r"(?i)(password|secret|token)=", DOCKERFILE)
    (compiler,) = set(re.findall(r"ziglang==[\d.]+", DOCKERFILE))
    assert compiler in (ROOT / "pyproject.toml").read_text()


def test_what_is_sent_to_the_builder_is_what_it_copies() -> None:
    lines = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    copied = {
        word for line in re.findall(r"^COPY (?!--)(.*)$", DOCKERFILE, re.M) for word in line.split()[:-1]
    }
    assert {line[1:] for line in lines if line.startswith("!")} == copied
    assert lines[1] == "*"


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
        assert SERVICES[name]["volumes"] == [f"mesh_data:{HOME}", "mesh_keys:/etc/microserve:ro"]
        assert SERVICES[name]["read_only"] is True and SERVICES[name]["cap_drop"] == ["ALL"]
    (published,) = SERVICES["pod"]["ports"]
    assert published.split(":")[-1] == str(Settings().gateway.port)
    assert published.startswith("127.0.0.1:")
    assert set(COMPOSE["volumes"]) == {"mesh_data", "mesh_keys"}
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
    assert settings.bus.curve_dir == KEYS
    port = settings.gateway.port if command == "gateway" else getattr(settings, command).metrics_port
    assert port and service["environment"]["HEALTH_URL"] == (
        f"http://127.0.0.1:{port}/{'ready' if command == 'gateway' else 'health'}"
    )
    if command in ("engine", "gateway"):
        drain_s = getattr(settings, command).drain_s
        assert int(service["stop_grace_period"].removesuffix("s")) > drain_s


def test_no_two_services_of_the_pod_have_one_port() -> None:
    urls = [SERVICES[name]["environment"]["HEALTH_URL"] for name in OURS]
    assert len(set(urls)) == len(OURS)


@pytest.fixture
def health_urls(tiny_model: Path, tmp_path: Path) -> Iterator[list[str]]:
    """The mesh of compose.yaml as processes: its commands and environment, other ports and home. Where each
    says whether it is well, the gateway last."""
    (tmp_path / "model").symlink_to(tiny_model)
    own = {
        "MICROSERVE_INDEX__ADDRESS": f"tcp://127.0.0.1:{free_port()}",
        "MICROSERVE_ROUTER__ADDRESS": f"tcp://127.0.0.1:{free_port()}",
    }
    ports = {port: str(free_port()) for port in ("7200", "7201", "7210", "7211", "8000")}

    def here(text: str) -> str:
        text = text.replace(KEYS, str(tmp_path / "keys")).replace(HOME, str(tmp_path))
        return re.sub(r"(?<=[:=])(7200|7201|7210|7211|8000)\b|^(7200|7201)$", lambda m: ports[m[0]], text)

    (script,) = SERVICES["keys"]["command"]
    making = here(script).partition(" && ")[0].split()[1:]
    subprocess.run([sys.executable, "-P", "-m", "microserve.services", *making], check=True)
    tied = [sys.executable, "-S", "-E", str(leash.__file__), str(os.getpid())]
    started = []
    try:
        for name in OURS:
            words = [*map(here, SERVICES[name]["command"])]
            given = {key: here(text) for key, text in SERVICES[name]["environment"].items()}
            with (tmp_path / f"{name}.log").open("w") as log:
                process = subprocess.Popen(
                    [*tied, sys.executable, "-P", "-m", "microserve.services", *words],
                    env={**os.environ, **given, **own},
                    stdout=log,
                    stderr=log,
                )
            started.append(process)
        yield [here(SERVICES[name]["environment"]["HEALTH_URL"]) for name in OURS]
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
def test_the_commands_make_a_mesh_whose_engines_reach_each_other(health_urls: list[str]) -> None:
    """Each healthcheck passes, by the image's command."""
    kind, _, *check = SERVICES["gateway"]["healthcheck"]["test"]
    assert kind == "CMD" and json.dumps(check[1]) in DOCKERFILE.partition("HEALTHCHECK")[2]
    deadline = time.monotonic() + 120
    for url in health_urls:
        environment = {**os.environ, "HEALTH_URL": url}
        while subprocess.run(
            [sys.executable, *check], env=environment, capture_output=True, check=False
        ).returncode:
            assert time.monotonic() < deadline, f"the healthcheck of {url} never passes"
    body = {"model": SERVICES["gateway"]["environment"]["MICROSERVE_MODEL__NAME"], "prompt": "x" * 40}
    answer = httpx.post(
        f"{health_urls[-1].removesuffix('/ready')}/v1/completions",
        json={**body, "max_tokens": 4},
        headers={"x-microserve-strategy": "disaggregated"},
        timeout=60,
    )
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] > 0
