"""Clients that people have, unmodified, each in an environment of its own: what they ask for works.

``make clients`` runs all, ``make clients CLIENT=litellm`` one. Each folder here is a client; its script says
what is tried.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.clients.environment import INSIDE, Client, clients
from tests.support.clients.servers import Servers, servers_in

TIMEOUT_S = 600.0
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "DO_NOT_TRACK": "1",
    "NO_PROXY": "127.0.0.1,localhost",
}
"""No client may ask anybody but us."""

pytestmark = [pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    with servers_in(tmp_path_factory.mktemp("clients")) as running:
        yield running


@pytest.mark.parametrize("client", clients(), ids=lambda client: client.name)
def test_client(client: Client, servers: Servers, tmp_path: Path) -> None:
    environment = {
        "PATH": f"{client.home / 'bin'}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "LANG": "C.UTF-8",
        "PYTHONPATH": str(INSIDE),
        "MICROSERVE_MESH": servers.mesh,
        "MICROSERVE_TALKER": servers.talker,
        "MICROSERVE_MODEL_DIR": str(servers.model),
        **OFFLINE,
    }
    with client.environment():
        done = subprocess.run(
            client.command(tmp_path),
            cwd=tmp_path,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    print(done.stdout)
    assert done.returncode == 0, done.stdout
