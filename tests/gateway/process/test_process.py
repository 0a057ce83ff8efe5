"""The gateway as a process: readiness, one JSON line an event, a clean stop, and exit codes."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from microserve.protocol import log
from microserve.protocol.settings.settings import Settings
from tests.support.gateway.gateway_world import gateway_world, run

pytestmark = pytest.mark.slow

TIMEOUT_S = 30.0


def start(*overrides: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-P", "-m", "microserve.services", "gateway"]
    for override in ("bus.insecure=true", *overrides):
        command += ["--set", override]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment})


def next_event(process: subprocess.Popen[str], name: str) -> Any:
    assert process.stderr is not None
    for line in process.stderr:
        event = json.loads(line)
        if event["event"] == name:
            return event
    raise AssertionError(f"no {name}; exit code {process.wait(TIMEOUT_S)}")


def test_a_life(model: Path, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(TIMEOUT_S)
        process = start(
            f"model.path={model}",
            "gateway.port=0",
            "bus.heartbeat_interval_s=0.05",
            NOTIFY_SOCKET=str(tmp_path / "notify"),
            WATCHDOG_USEC="1000000",
        )
        with process:
            started = next_event(process, log.SERVICE_STARTED)
            ready = next_event(process, log.SERVICE_READY)
            assert started["service"] == ready["service"] == "gateway"
            assert started["id"] == ready["id"]
            assert systemd.recv(100).startswith(b"READY=1\n")
            assert systemd.recv(100) == b"WATCHDOG=1"
            with urllib.request.urlopen(f"{ready['address']}/health", timeout=TIMEOUT_S) as reply:
                assert reply.status == 200
            request = urllib.request.Request(f"{ready['address']}/v1/completions", data=b"{", method="POST")
            with pytest.raises(urllib.error.HTTPError) as caught:
                urllib.request.urlopen(request, timeout=TIMEOUT_S)
            caught.value.close()
            assert caught.value.code == 400
            line = next_event(process, log.REQUEST_FINISHED)
            assert (line["service"], line["id"], line["status"]) == ("gateway", started["id"], 400)
            process.send_signal(signal.SIGTERM)
            next_event(process, log.SERVICE_STOPPED)
            assert process.wait(TIMEOUT_S) == 0
            states = {systemd.recv(100)}
            while b"STOPPING=1" not in states:
                states.add(systemd.recv(100))


@pytest.mark.parametrize(
    ("overrides", "detail"),
    [
        (["model.path="], "model.path is not set"),
        (["model.path=/nonexistent"], "no directory with a config.json"),
        (["gateway.prot=1"], "gateway.prot"),
        (["gateway.max_n=0"], "gateway.max_n"),
    ],
)
def test_a_wrong_setting_is_exit_code_2(overrides: list[str], detail: str) -> None:
    with start("gateway.port=0", *overrides) as process:
        _, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 2
    assert detail in errors
    assert "Traceback" not in errors


def test_no_heavy_imports() -> None:
    program = (
        "import sys, microserve.services.command.main, microserve.gateway.server\n"
        "print([n for n in ('torch', 'transformers', 'numpy', 'pydantic', 'fastapi') if n in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True, timeout=TIMEOUT_S
    )
    assert found.stdout.strip() == "[]"


def test_a_second_gateway_in_one_process(model: Path) -> None:
    """Nothing of a gateway is global: two live side by side, and a third where one was."""

    async def main() -> None:
        async with gateway_world(model) as one, gateway_world(model) as two:
            assert one.address != two.address
        async with gateway_world(model):
            pass

    run(main())


def test_half_a_body_does_not_hold_up_a_stop(model: Path) -> None:
    """Its client is told what everybody is told, and the process ends as it should."""
    with start(f"model.path={model}", "gateway.port=0") as process:
        address = next_event(process, log.SERVICE_READY)["address"]
        port = int(address.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S) as client:
            client.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: t\r\ncontent-length: 99\r\n\r\n{")
            with urllib.request.urlopen(f"{address}/health", timeout=TIMEOUT_S):
                pass  # the first part has been read by now
            asked_at = time.monotonic()
            process.send_signal(signal.SIGTERM)
            answer = b""
            while part := client.recv(4096):
                answer += part
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"retry-after: 1" in answer and b'"code":"draining"' in answer
        assert process.wait(TIMEOUT_S) == 0
        assert time.monotonic() - asked_at < Settings().gateway.drain_s


def test_a_gateway_that_is_killed_leaves_no_process(model: Path) -> None:
    with start(f"model.path={model}", "gateway.port=0") as process:
        address = next_event(process, log.SERVICE_READY)["address"]
        body = json.dumps({"messages": [{"role": "user", "content": "x"}]}).encode()
        with urllib.request.urlopen(f"{address}/tokenize", data=body, timeout=TIMEOUT_S) as reply:
            assert reply.status == 200
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(children) == 1
        helper = os.pidfd_open(int(children[0]))
        process.kill()
        ended, _, _ = select.select([helper], [], [], TIMEOUT_S)
        os.close(helper)
        assert ended
