"""A real Prometheus on loopback, and what it is asked."""

from __future__ import annotations

import math
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.process.processes import free_port
from tests.test_packaging import ROOT

WAIT_S = 120.0
LOOK_S = 0.5
DEPLOY = ROOT / "deploy/prometheus"


def binary(name: str) -> str:
    """``prometheus`` or ``promtool``; the test is skipped where there is none."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"no {name} here: apt-get install prometheus, or make boards, which fetches it")
    return found


def promtool(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [binary("promtool"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


class Prometheus:
    def __init__(self, url: str) -> None:
        self._http = httpx.Client(base_url=url, timeout=60)
        self._began = time.time()

    def get(self, path: str, **parameters: str) -> Any:
        """What is in ``data`` of the answer."""
        reply = self._http.get(f"/api/v1/{path}", params=parameters)
        assert reply.status_code == 200, reply.text
        return reply.json()["data"]

    def shows(self, expression: str) -> bool:
        """Some number has been there since this began; NaN, of a ratio of nothing, is none."""
        parameters = {"start": str(self._began), "end": str(time.time()), "step": "1"}
        found = self.get("query_range", query=expression, **parameters)["result"]
        return any(math.isfinite(float(value)) for series in found for _, value in series["values"])

    def firing(self) -> dict[str, list[dict[str, Any]]]:
        """Alerts that are, by name."""
        found: dict[str, list[dict[str, Any]]] = {}
        for alert in self.get("alerts")["alerts"]:
            if alert["state"] == "firing":
                found.setdefault(alert["labels"]["alertname"], []).append(alert)
        return found

    def close(self) -> None:
        self._http.close()


@contextmanager
def prometheus(config: Path, directory: Path) -> Iterator[Prometheus]:
    """``directory``: where it keeps what it has and writes its log."""
    port = free_port()
    command = [
        *(binary("prometheus"), f"--config.file={config}", f"--storage.tsdb.path={directory / 'data'}"),
        *(f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"),
    ]
    log = directory / "prometheus.log"
    with log.open("w") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=sink)
    client = Prometheus(f"http://127.0.0.1:{port}")
    try:
        wait_for(lambda: _is_ready(process, port, log), "Prometheus is ready")
        yield client
    finally:
        client.close()
        process.terminate()
        process.wait(30)


def wait_for(what: Callable[[], object], name: str) -> None:
    until = time.monotonic() + WAIT_S
    while not what():
        assert time.monotonic() < until, f"not within {WAIT_S:g} s: {name}"
        time.sleep(LOOK_S)


def _is_ready(process: subprocess.Popen[bytes], port: int, log: Path) -> bool:
    assert process.poll() is None, log.read_text()
    try:
        return httpx.get(f"http://127.0.0.1:{port}/-/ready", timeout=10).status_code == 200
    except httpx.TransportError:
        return False
