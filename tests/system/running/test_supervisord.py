"""A real supervisord with deploy/supervisord.conf: the mesh answers, and stops with nothing left."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import psutil
import pytest

from microserve.protocol.bus.curve import create_mesh_keys
from microserve.services.local.composition import free_ports
from microserve.services.local.demo.request import Answer, Gateway
from microserve.services.local.event_log import EventLog

CONFIGURATION = Path(__file__).parents[3] / "deploy" / "supervisord.conf"
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 90.0


async def ask(gateway: Gateway) -> Answer:
    await gateway.until_ready(START_TIMEOUT_S)
    return await gateway.chat(await gateway.model(), "Hello!", lambda piece: None)


@pytest.mark.system
def test_mesh_under_supervisord(tiny_model: Path, tmp_path: Path) -> None:
    index, router, port = free_ports(3)
    keys = create_mesh_keys(tmp_path / "keys")
    settings = tmp_path / "microserve.toml"
    settings.write_text(
        f'[bus]\ncurve_dir = "{keys}"\n'
        f'[model]\npath = "{tiny_model}"\nname = "tiny"\n'
        f'[index]\naddress = "tcp://127.0.0.1:{index}"\n'
        f'[router]\naddress = "tcp://127.0.0.1:{router}"\n'
        f"[gateway]\nport = {port}\nworkers = 2\n"
        "[kvcache]\nnum_blocks = 64\n"
    )
    logs = tmp_path / "logs"
    logs.mkdir()
    environment = {
        **os.environ,
        "MICROSERVE_BIN": sysconfig.get_path("scripts"),
        "MICROSERVE_CONFIG": str(settings),
        "MICROSERVE_LOGS": str(logs),
        "MICROSERVE_ENGINES": "2",
    }
    command = [sys.executable, "-P", "-m", "supervisor.supervisord", "-c", str(CONFIGURATION)]
    output = tmp_path / "supervisord.out"
    with output.open("wb") as sink:
        process = subprocess.Popen(command, env=environment, stdout=sink, stderr=sink)
    children: list[psutil.Process] = []
    try:
        answer = asyncio.run(ask(Gateway("127.0.0.1", port)))
        children = psutil.Process(process.pid).children(recursive=True)
        assert answer.num_tokens > 0
        assert len(psutil.Process(process.pid).children()) == 5
        assert sum("--worker" in child.cmdline() for child in children) == 2
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_TIMEOUT_S)
        finally:
            process.kill()
            process.wait()
            _, alive = psutil.wait_procs(children, 10)
            for left in alive:
                left.kill()
    assert alive == []
    events = EventLog(logs)
    ended = [event["service"] for event in events.read() if event["event"] == "service.stopped"]
    events.close()
    assert sorted(ended) == [*["engine"] * 2, *["gateway"] * 3, "index", "router"], output.read_text()
