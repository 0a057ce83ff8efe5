"""A gateway with few descriptors and many connections serves: it lets in what it has room for."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from microserve.protocol import log

pytestmark = pytest.mark.slow

TIMEOUT_S = 30.0


@pytest.fixture
def gateway(model: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], str, Path]]:
    """With 200 descriptors, soft limit 100, and no router."""
    settings = [
        *(f"model.path={model}", "gateway.port=0", "bus.heartbeat_interval_s=0.05"),
        *(f"log.dir={tmp_path}", "log.file=g.jsonl", "bus.insecure=true"),
    ]
    command = ["sh", "-c", 'ulimit -Sn 100; ulimit -Hn 200; exec "$0" "$@"', sys.executable, "-P"]
    command += ["-m", "microserve.services", "gateway"]
    command += [word for each in settings for word in ("--set", each)]
    with subprocess.Popen(command) as process:
        try:
            yield process, ready_address(process, tmp_path / "g.jsonl"), tmp_path / "g.jsonl"
        finally:
            process.kill()


def ready_address(process: subprocess.Popen[bytes], path: Path) -> str:
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        for line in path.read_text().splitlines() if path.exists() else []:
            event = json.loads(line)
            if event["event"] == log.SERVICE_READY:
                return str(event["address"])
        time.sleep(0.02)
    raise AssertionError(f"not ready; exit code {process.poll()}")


SILENT = {
    "says nothing": b"",
    "has been answered": b"GET /health HTTP/1.1\r\nhost: t\r\n\r\n",
    "was refused before its body": b"POST /health HTTP/1.1\r\nhost: t\r\ncontent-length: 1000\r\n\r\n",
    "owes its body": b"POST /tokenize HTTP/1.1\r\nhost: t\r\ncontent-length: 1000\r\n\r\n",
}


@pytest.mark.parametrize("first", SILENT.values(), ids=SILENT)
def test_four_hundred_idle_connections_hold_nobody_else_up(
    gateway: tuple[subprocess.Popen[bytes], str, Path], first: bytes
) -> None:
    process, address, path = gateway
    host, port = address.removeprefix("http://").split(":")
    with contextlib.ExitStack() as stack:
        for _ in range(400):
            idle = stack.enter_context(socket.create_connection((host, int(port)), TIMEOUT_S))
            idle.sendall(first)
        with urllib.request.urlopen(f"{address}/health", timeout=TIMEOUT_S) as reply:
            assert reply.status == 200
        assert len(os.listdir(f"/proc/{process.pid}/fd")) < 200
    with urllib.request.urlopen(f"{address}/health", timeout=TIMEOUT_S) as reply:
        assert reply.status == 200
    assert process.poll() is None
    events = [json.loads(line) for line in path.read_text().splitlines()]
    assert any(event["event"] == log.HTTP_PAUSED for event in events)
    process.terminate()
    assert process.wait(TIMEOUT_S) == 0
