"""``microserve model`` and ``--model`` as they are typed: what is printed, and the exit codes."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from microserve.services.command.main import main
from tests.support.hub.server import Hub, digest_of, serving
from tests.support.hub.small_model import FILES, WEIGHTS

FREE_PORTS = (
    *("--port", "0", "--set", "index.address=tcp://127.0.0.1:0"),
    *("--set", "router.address=tcp://127.0.0.1:0"),
)
"""A mesh may be running here."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub()
    hub.add("org/tiny", dict(FILES))
    monkeypatch.chdir(tmp_path)  # what stands for no file may be one, seen from a checkout
    with serving(hub):
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        yield hub


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def test_a_model_is_fetched_listed_and_removed(hub: Hub) -> None:
    done = run("model", "fetch", "org/tiny")
    assert done.exit_code == 0, done.output
    directory = Path(done.stdout.strip())
    assert (directory / WEIGHTS).read_bytes() == FILES[WEIGHTS]
    listed = run("model", "list").output.split()
    assert listed[:3] == ["org/tiny", directory.name[:8], "main"] and listed[-1] == "whole"
    assert run("model", "remove", "org/tiny").exit_code == 0
    assert run("model", "list").output == "" and not directory.exists()
    again = run("model", "remove", "org/tiny")
    assert again.exit_code == 1 and "org/tiny is not in" in again.output


def test_a_revision_is_a_flag_or_behind_the_name(hub: Hub) -> None:
    commit = hub.repos["org/tiny"].commit({**FILES, WEIGHTS: b"v2"}, "v2")
    for arguments in (("org/tiny@v2",), ("org/tiny", "--revision", "v2")):
        assert Path(run("model", "fetch", *arguments).stdout.strip()).name == commit
    wrong = run("model", "fetch", "org/tiny@v2", "--revision", "v1")
    assert wrong.exit_code == 2 and "--revision goes with ORG/NAME" in wrong.output


@pytest.mark.parametrize(
    ("name", "code", "told"),
    [
        ("org/absent", 1, "has no model org/absent"),
        ("org/tiny@v9", 1, "org/tiny has no revision 'v9'"),
        ("../../etc", 2, "no model's name at the Hub"),
        ("org/tiny@../../x", 2, "is no revision"),
    ],
)
@pytest.mark.parametrize("command", [("model", "fetch"), ("engine", "--model"), ("up", "--model")])
def test_what_cannot_be_had_is_one_line_and_an_exit_code(
    hub: Hub, tmp_path: Path, command: tuple[str, ...], name: str, code: int, told: str
) -> None:
    rest = ["--directory", str(tmp_path / "mesh")] if command[0] != "model" else []
    rest += FREE_PORTS if command[0] == "up" else []
    done = run(*command, name, *rest)
    assert done.exit_code == code, done.output
    last = done.stderr.strip().splitlines()[-1]
    assert told in last and last.startswith("Error: ")
    assert not list(tmp_path.rglob("refs/*"))


def test_a_gguf_file_an_adapter_and_an_empty_directory_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    for name, told in (("empty", "no config.json"), ("adapter", "an adapter"), ("tiny.gguf", "a GGUF file")):
        for command in ("engine", "up"):
            port = FREE_PORTS if command == "up" else ()
            done = run(command, "--model", str(tmp_path / name), "--directory", str(tmp_path / "mesh"), *port)
            assert done.exit_code == 2 and told in done.stderr


def test_an_interrupt_leaves_what_has_come_and_the_next_call_goes_on(hub: Hub, tmp_path: Path) -> None:
    weights = bytes(6 << 20)
    hub.add("org/tiny", {**FILES, WEIGHTS: weights})
    hub.held = threading.Event()
    blobs = tmp_path / "hf" / "hub" / "models--org--tiny" / "blobs"
    partial = blobs / f"{digest_of(WEIGHTS, weights)}.incomplete"
    command = [sys.executable, "-P", "-m", "microserve.services", "model", "fetch", "org/tiny"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            assert hub.reached.wait(60)
            while not partial.exists() or partial.stat().st_size < 1 << 20:
                assert process.poll() is None
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)
            output, error = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 1 and b"Traceback" not in error and output == b""
    here = partial.stat().st_size
    assert 0 < here < len(weights)
    hub.held.set()
    hub.asked.clear()
    done = run("model", "fetch", "org/tiny")
    assert done.exit_code == 0, done.output
    assert (Path(done.stdout.strip()) / WEIGHTS).read_bytes() == weights
    assert any(line.endswith(f"bytes={here}-") for line in hub.asked)
