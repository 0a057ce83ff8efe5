"""The units under a real systemd: ready, watched, started again, with their state."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from microserve.kernels.cpu.build import main as compile_kernels
from tests.support.deploy.booted_systemd import Booted, missing

pytestmark = [pytest.mark.system, pytest.mark.heavy, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 240.0
SERVICES = (
    "microserve-index",
    "microserve-router",
    "microserve-gateway",
    "microserve-engine@e0",
    "microserve-engine@e1",
)
NUM_WORKERS = 2
"""Of the gateway, beside the process that systemd sees."""
SETTINGS = """
[bus]
curve_dir = "/etc/microserve/keys"
[model]
path = "/srv/model"
name = "tiny"
[index]
control_path = "/var/lib/microserve/control.db"
[kvcache]
num_blocks = 64
[gateway]
workers = 2
[log]
dir = "/var/log/microserve"
"""
ASK = """
import json, sys, urllib.request
body = {"model": "tiny", "prompt": "Hello " * 20, "max_tokens": 4}
headers = {"content-type": "application/json", "x-microserve-strategy": sys.argv[1]}
request = urllib.request.Request("http://127.0.0.1:8000/v1/completions", json.dumps(body).encode(), headers)
print(urllib.request.urlopen(request, timeout=60).read().decode())
"""


@pytest.fixture(scope="module")
def systemd(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Booted]:
    """Booted, with nothing of ours started yet."""
    if why := missing():
        pytest.skip(why)
    folder = tmp_path_factory.mktemp("systemd")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run(
        [*command, "--wheel-dir", str(folder / "wheel"), str(ROOT)], check=True, capture_output=True
    )
    (wheel,) = (folder / "wheel").glob("*.whl")
    compile_kernels(["--ahead", "--into", str(folder / "wheel/prebuilt")])
    with Booted(folder, ROOT / "deploy/systemd", wheel, tiny_model) as booted:
        until(booted.is_up, booted)
        booted.write("/etc/microserve/microserve.toml", SETTINGS)
        keys = "/etc/microserve/keys"
        booted.run("/opt/microserve/bin/microserve", "keys", "--mesh", keys, check=True)
        booted.run("chown", "-R", "microserve:", keys, check=True)
        yield booted


@pytest.fixture
def mesh(systemd: Booted) -> Booted:
    """The whole of it, started as deploy/systemd/microserve.target says."""
    systemd.run("systemctl", "enable", "--now", "microserve.target", *SERVICES, check=True)
    return systemd


def until(condition: Callable[[], object], booted: Booted) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, booted.told
        time.sleep(0.1)


def ask(booted: Booted, strategy: str = "auto") -> dict[str, object]:
    answers: list[dict[str, object]] = []

    def answered() -> bool:
        done = booted.run("/opt/microserve/bin/python", "-c", ASK, strategy)
        if done.returncode == 0:
            answers.append(json.loads(done.stdout))
        return bool(answers)

    until(answered, booted)  # an engine may not have been met yet
    return answers[0]


def pid(booted: Booted, unit: str) -> int:
    return int(booted.show(unit, "MainPID")[0])


def restarts(booted: Booted, unit: str) -> int:
    return int(booted.show(unit, "NRestarts")[0])


def test_what_is_started_is_ready_and_serves(mesh: Booted) -> None:
    for unit in SERVICES:  # Type=notify: `enable --now` has waited for each to be ready
        assert mesh.show(unit, "ActiveState", "SubState", "Result", "User") == [
            "active",
            "running",
            "success",
            "microserve",
        ]
        assert mesh.show(unit, "StatusText")[0].startswith("ready at "), unit
    answer = ask(
        mesh, "disaggregated"
    )  # KV from one engine's memory to the other's, under all that the units forbid
    assert answer["usage"]["completion_tokens"] == 4  # type: ignore[index]
    requests = mesh.run(
        "/opt/microserve/bin/microserve", "tail", "--dir", "/var/log/microserve", "--service", "engine"
    )
    assert " kv.sent " in requests.stdout


def test_state_is_kept_in_the_state_directory(mesh: Booted) -> None:
    assert (
        mesh.run("stat", "-c", "%U:%G", "/var/lib/microserve/control.db", check=True).stdout
        == "microserve:microserve\n"
    )
    microserve = ("/opt/microserve/bin/microserve", "strategy")
    config = ("--config", "/etc/microserve/microserve.toml")
    mesh.run(*microserve, "set", "balanced", "ratio=0.25", *config, check=True)
    mesh.run("systemctl", "restart", "microserve-index", check=True)
    assert "ratio" in mesh.run(*microserve, "history", *config, check=True).stdout


def test_a_reload_opens_logs_anew_and_reads_settings_again(mesh: Booted) -> None:
    before = [pid(mesh, unit) for unit in SERVICES]
    mesh.run(
        "/bin/sh",
        "-c",
        "cd /var/log/microserve && for file in *.jsonl; do mv $file $file.old; done",
        check=True,
    )
    mesh.run("systemctl", "reload", *SERVICES, check=True)

    def reloaded() -> str:
        return mesh.run("/bin/sh", "-c", "cat /var/log/microserve/*.jsonl").stdout

    until(lambda: reloaded().count('"settings.reloaded"') == len(SERVICES) + NUM_WORKERS, mesh)
    assert [pid(mesh, unit) for unit in SERVICES] == before
    assert ask(mesh)


@pytest.mark.parametrize("unit", ["microserve-router", "microserve-engine@e1"])
def test_what_dies_is_started_again(mesh: Booted, unit: str) -> None:
    before, count = pid(mesh, unit), restarts(mesh, unit)
    mesh.run("systemctl", "kill", "--signal=KILL", unit, check=True)
    until(lambda: mesh.show(unit, "ActiveState") == ["active"] and pid(mesh, unit) not in (0, before), mesh)
    assert restarts(mesh, unit) == count + 1
    assert ask(mesh)


def test_what_hangs_is_ended_by_the_watchdog_and_started_again(mesh: Booted) -> None:
    unit = "microserve-router"
    mesh.write(f"/etc/systemd/system/{unit}.service.d/soon.conf", "[Service]\nWatchdogSec=3\n")
    mesh.run("systemctl", "daemon-reload", check=True)
    mesh.run("systemctl", "restart", unit, check=True)
    before, count = pid(mesh, unit), restarts(mesh, unit)
    mesh.run("systemctl", "kill", "--signal=STOP", unit, check=True)
    until(lambda: restarts(mesh, unit) > count and mesh.show(unit, "ActiveState") == ["active"], mesh)
    assert pid(mesh, unit) not in (0, before)
    assert "watchdog" in mesh.run("journalctl", "--no-pager", "--unit", unit).stdout.lower()
    assert ask(mesh)


def test_a_wrong_setting_is_not_tried_again_and_is_said(mesh: Booted) -> None:
    unit = "microserve-gateway"
    mesh.write("/etc/microserve/gateway.env", "MICROSERVE_GATEWAY__PRT=1\n")
    assert mesh.run("systemctl", "restart", unit).returncode != 0
    assert mesh.show(unit, "ActiveState", "Result", "ExecMainStatus") == ["failed", "exit-code", "2"]
    told = mesh.run("journalctl", "--no-pager", "--unit", unit, check=True).stdout
    assert "gateway.prt: unknown field, did you mean MICROSERVE_GATEWAY__PORT?" in told
    mesh.write("/etc/microserve/gateway.env", "MICROSERVE_GATEWAY__PORT=8000\n")
    mesh.run("systemctl", "start", unit, check=True)
    assert ask(mesh)


def test_a_model_that_its_user_cannot_read_is_said(mesh: Booted) -> None:
    unit = "microserve-engine@e1"
    mesh.run("chmod", "600", "/srv/model/model.safetensors", check=True)
    try:
        assert mesh.run("systemctl", "restart", unit).returncode != 0
        told = mesh.run("journalctl", "--no-pager", "--unit", unit, check=True).stdout
        assert "model.safetensors cannot be read by this user" in told
    finally:
        mesh.run("chmod", "644", "/srv/model/model.safetensors", check=True)
        mesh.run("systemctl", "start", unit, check=True)


def test_a_file_of_settings_that_is_not_there_is_said(systemd: Booted) -> None:
    command = "/opt/microserve/bin/microserve index --config /etc/microserve/absent.toml"
    override = f"[Service]\nExecStart=\nExecStart={command}\n"
    systemd.write("/etc/systemd/system/microserve-index.service.d/absent.conf", override)
    systemd.run("systemctl", "daemon-reload", check=True)
    assert systemd.run("systemctl", "restart", "microserve-index").returncode != 0
    systemd.run("rm", "/etc/systemd/system/microserve-index.service.d/absent.conf", check=True)
    systemd.run("systemctl", "daemon-reload", check=True)
    told = systemd.run("journalctl", "--no-pager", "--unit", "microserve-index").stdout
    assert "cannot read /etc/microserve/absent.toml: No such file or directory" in told
    systemd.run("systemctl", "start", "microserve-index", check=True)


def test_all_stops_with_its_target(mesh: Booted) -> None:
    mesh.run("systemctl", "stop", "microserve.target", check=True)
    until(lambda: all(mesh.show(unit, "ActiveState") == ["inactive"] for unit in SERVICES), mesh)
    for unit in SERVICES:
        assert mesh.show(unit, "Result", "ExecMainStatus") == ["success", "0"]
    assert mesh.run("test", "-e", "/var/lib/microserve/control.db").returncode == 0
