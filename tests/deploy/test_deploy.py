"""The files of deploy/: units that systemd accepts, an example that names every setting."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import msgspec
import pytest

from microserve.protocol.settings.settings import Settings
from microserve.protocol.settings.sources import load_settings

DEPLOY = Path(__file__).parents[2] / "deploy"
INSTALLED = "/opt/microserve/bin/microserve"
SERVICES = ("index", "router", "gateway", "engine@")


def verify(units: list[Path]) -> str:
    """What systemd-analyze has to say; empty: nothing."""
    command = ["systemd-analyze", "verify", "--man=no", *map(str, units)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr + (f"exit code {done.returncode}" if done.returncode else "")


@pytest.fixture
def units(tmp_path: Path) -> list[Path]:
    """Copies whose command exists on this machine, with one engine instance."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze on this machine")
    copies = []
    for unit in sorted((DEPLOY / "systemd").iterdir()):
        copy = tmp_path / unit.name.replace("@.", "@e0.")
        copy.write_text(unit.read_text().replace(INSTALLED, sys.executable))
        copies.append(copy)
    return copies


def test_systemd_accepts_every_unit(units: list[Path]) -> None:
    assert len(units) == len(SERVICES) + 1
    assert verify(units) == ""


def test_that_check_can_fail(units: list[Path]) -> None:
    units[0].write_text(units[0].read_text().replace("WatchdogSec=", "WatchdogSecs="))
    assert "WatchdogSecs" in verify(units)


@pytest.mark.parametrize("service", SERVICES)
def test_units_notify_are_watched_and_do_not_retry_wrong_settings(service: str) -> None:
    unit = configparser.RawConfigParser(strict=False, delimiters=["="])
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(DEPLOY / "systemd" / f"microserve-{service}.service")
    section = unit["Service"]
    assert section["Type"] == "notify"
    assert int(section["WatchdogSec"]) > 0
    assert section["NotifyAccess"] == "main"
    assert section["Restart"] == "on-failure"
    assert section["RestartPreventExitStatus"] == "2"
    assert section["ExecStart"].startswith(f"{INSTALLED} {service.rstrip('@')} ")


def test_engines_outlive_their_drain() -> None:
    text = (DEPLOY / "systemd" / "microserve-engine@.service").read_text()
    (stop_s,) = re.findall(r"^TimeoutStopSec=(\d+)$", text, re.M)
    assert int(stop_s) > Settings().engine.drain_s
    supervisord = (DEPLOY / "supervisord.conf").read_text().partition("[program:engine]")[2]
    assert int(re.findall(r"^stopwaitsecs=(\d+)$", supervisord, re.M)[0]) > Settings().engine.drain_s


def test_gateways_outlive_their_drain() -> None:
    drain_s = Settings().gateway.drain_s
    text = (DEPLOY / "systemd" / "microserve-gateway.service").read_text()
    assert int(re.findall(r"^TimeoutStopSec=(\d+)$", text, re.M)[0]) > drain_s
    supervisord = (DEPLOY / "supervisord.conf").read_text().partition("[program:gateway]")[2]
    assert int(re.findall(r"^stopwaitsecs=(\d+)$", supervisord, re.M)[0]) > drain_s


def test_supervisord_leaves_a_drained_service_stopped_as_systemd_does() -> None:
    """Exit code 0: asked to leave; 2: a wrong setting. Neither is started again."""
    supervisord = configparser.RawConfigParser(inline_comment_prefixes=(";",))
    supervisord.read(DEPLOY / "supervisord.conf")
    programs = [name for name in supervisord.sections() if name.startswith("program:")]
    assert len(programs) == len(SERVICES)
    for name in programs:
        assert supervisord[name]["autorestart"] == "unexpected"
        assert supervisord[name]["exitcodes"].split(",") == ["0", "2"]


def test_the_example_loads_as_it_is() -> None:
    assert load_settings(DEPLOY / "microserve.toml") == Settings()


def test_the_example_names_every_setting_with_its_default() -> None:
    text = (DEPLOY / "microserve.toml").read_text()
    uncommented = tomllib.loads(re.sub(r"^#(?=\w+ = )", "", text, flags=re.M))
    assert uncommented == msgspec.to_builtins(Settings())
