"""The two servers that all clients talk to: a whole mesh, and a gateway whose engine says given tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.support.clients.leaning_model import make_leaning_model
from tests.support.clients.talker import talker
from tests.support.process.processes import MeshProcesses

MESH_MODEL = "leaning"


@dataclass(frozen=True)
class Servers:
    mesh: str
    """Base addresses, without ``/v1``."""
    talker: str
    model: Path


@contextmanager
def servers_in(directory: Path) -> Iterator[Servers]:
    model = make_leaning_model(directory / "model")
    settings = [f"model.name={MESH_MODEL}", "kvcache.num_blocks=4096", "bus.stuck_s=60"]
    with (
        MeshProcesses(model, directory, gateway=True, settings=settings) as mesh,
        talker(model, directory / "talker.log") as talking,
    ):
        base = f"http://127.0.0.1:{mesh.gateway_port}"
        for address in (base, talking):
            wait_ready(address)
        yield Servers(base, talking, model)


def wait_ready(base: str) -> None:
    """``/ready`` itself says when."""
    with httpx.Client(timeout=60.0) as http:
        for _ in range(600):
            if http.get(f"{base}/ready").status_code == 200:
                return
    raise TimeoutError(f"{base} is not ready")
