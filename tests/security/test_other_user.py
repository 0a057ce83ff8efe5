"""Another user of the machine gets nothing from a mesh that ``microserve up`` runs: case B3's attempts."""

from __future__ import annotations

import asyncio
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from microserve.kvcache.heap.memfd import HeapFile
from microserve.kvcache.layout import KvLayout
from microserve.protocol.bus.curve import create_keys
from microserve.protocol.errors import TransferFailed
from microserve.protocol.messages.kv.grant import HeapAddress
from tests.support.security.intruder import Targets, as_user, attempts, look_around, try_all
from tests.support.security.up_mesh import UpMesh, up_mesh

pytestmark = [
    pytest.mark.system,
    pytest.mark.timeout(300),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user"),
]

NOBODY = 65534
SECONDS = 5.0
"""Longer than a handshake may take, so that one refused is tried again."""

MAY = {
    "publish a strategy": "operator",
    "register an engine": "engine",
    "watch the members": "operator",
    "ask as a gateway": "gateway",
    "read what is cached": "router",
    "generate on an engine": "router",
    "drain an engine": "",
}
"""Who gets something by the same words; nobody drains in this test."""


@pytest.fixture(scope="module")
def mesh(tiny_model: Path) -> Iterator[UpMesh]:
    with up_mesh(tiny_model) as running:
        yield running


@pytest.fixture
def busy(mesh: UpMesh) -> Iterator[UpMesh]:
    """Prompts come all the time, so that there is something to read."""
    stop = threading.Event()

    def ask() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            body = {"model": "tiny", "prompt": [number % 200 + 3] * 40, "max_tokens": 2}
            httpx.post(f"{mesh.state.url}/v1/completions", json=body, timeout=60.0).raise_for_status()

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    yield mesh
    stop.set()
    thread.join(60)


def nothing(targets: Targets) -> dict[str, list[str]]:
    return {name: [] for name in [*(each.name for each in attempts(targets)), "read events", "replay events"]}


@pytest.mark.parametrize("has_pair", [False, True], ids=["no keys", "keys of his own"])
def test_sockets_say_nothing_to_another_user(busy: UpMesh, has_pair: bool) -> None:
    targets = busy.targets
    wanted = {each.name: each for each in attempts(targets)}

    def attack() -> dict[str, list[str]]:
        with tempfile.TemporaryDirectory(dir="/tmp") as home:
            keys = create_keys(Path(home) / "stranger") if has_pair else None
            return asyncio.run(try_all(targets, keys, wanted, SECONDS))

    assert as_user(NOBODY, attack) == nothing(targets)
    listed = busy.run("strategy", "list")
    assert (listed.returncode, "intruder" in listed.stdout) == (0, False), listed.stdout + listed.stderr
    engines = busy.run("label", "--list").stdout
    assert "intruder" not in engines and "e0" in engines and "e1" in engines


@pytest.mark.parametrize("role", ["operator", "engine", "gateway", "router"])
def test_the_same_words_are_heard_from_who_has_the_right(busy: UpMesh, role: str) -> None:
    """So the attempts above were real ones."""
    wanted = {each.name: each for each in attempts(busy.targets) if MAY[each.name] == role}
    got = asyncio.run(try_all(busy.targets, busy.keys(role), wanted, 2.0))
    for name in [*wanted, *(["read events", "replay events"] if role == "router" else [])]:
        answers = [each for each in got[name] if "protocol_violation" not in each]
        assert answers, (name, got[name])
        assert not any("not_permitted" in each for each in answers), (name, answers)


def test_files_and_processes_are_closed_to_another_user(mesh: UpMesh) -> None:
    root, pids = mesh.directory.root, mesh.pids
    assert as_user(NOBODY, lambda: look_around(root, pids)) == {}
    ours = look_around(root, [])
    assert {f"{root}/keys/index/service.key_secret", f"{root}/logs/gateway.jsonl"} <= set(ours), (
        "they are there"
    )


def test_a_heap_cannot_be_opened_by_another_user(mesh: UpMesh) -> None:
    """Not even by who knows its process, its number and how it is laid out."""
    engine = next(child.pid for child in mesh.state.children if child.name == "engine-e0")
    descriptors = {int(name) for name in os.listdir(f"/proc/{engine}/fd")}
    heaps = [fd for fd in descriptors if "memfd:microserve-kv" in os.readlink(f"/proc/{engine}/fd/{fd}")]
    assert heaps
    host = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    address = HeapAddress("shm", host, engine, heaps[0], 1, 1)
    layout = KvLayout("tiny", 2, 64, 16, 2, 16, "float32")

    def attach() -> str:
        with pytest.raises(TransferFailed) as caught:
            HeapFile.open(address, "shm", layout)
        return caught.value.detail

    assert "cannot be opened (another user's?)" in as_user(NOBODY, attach)
    assert "its owner was replaced" in attach(), "its owner's own user gets further"
