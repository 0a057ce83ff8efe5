"""A whole mesh under CURVE: whoever holds a trusted key is served, others are not heard."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from tokenizers import Tokenizer

from microserve.protocol.bus.curve import CurveKeys, create_keys
from microserve.protocol.bus.transport import ZmqBus
from microserve.protocol.messages.request.sampling import SamplingParams
from tests.support.bus.gateway_peer import BusClient
from tests.support.process.cases import Case
from tests.support.process.exactness import oracle
from tests.support.process.processes import MeshProcesses

pytestmark = [pytest.mark.system, pytest.mark.timeout(400)]

GREEDY = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)


def test_keys_are_needed_and_enough(tiny_model: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    create_keys(keys)
    with MeshProcesses(tiny_model, tmp_path, gateway=True, settings=[f"bus.curve_dir={keys}"]) as mesh:
        asyncio.run(_serve(mesh, keys))


async def _serve(mesh: MeshProcesses, keys: Path) -> None:
    trusted = ZmqBus(linger_s=0.1, keys=CurveKeys.load(keys))
    try:
        async with BusClient(trusted, mesh.router_address) as client:
            await client.wait_engines(2)
            prompt = list(range(20, 120))
            answers = [
                (await client.generate(prompt, GREEDY, strategy=name)).token_ids
                for name in ("data_parallel", "disaggregated", "migrate")
            ]
            assert answers[0] == answers[1] == answers[2]
            assert len(answers[0]) == 6

            stranger = ZmqBus(linger_s=0.0)
            heard: list[list[bytes]] = []
            try:
                socket = stranger.client(mesh.router_address, heard.append)
                socket.send([b"\x01\x03", b"\x94\x01\xa1x\x01\x04"])
                # Long enough for an answer: a trusted one comes meanwhile.
                assert (await client.generate(prompt, GREEDY)).reason == "length"
                assert heard == []
            finally:
                stranger.close()
    finally:
        trusted.close()


PEERS = {
    "index": ["engine-0", "engine-1", "router", "router-1", "operator"],
    "engine-0": ["index", "router", "router-1", "operator"],
    "engine-1": ["index", "router", "router-1", "operator"],
    "router": ["gateway"],
    "router-1": ["gateway"],
    "gateway": [],
    "operator": [],
    "gateway-1": [],
}
"""Who trusts whom, as docs/operations.md says; nobody trusts ``gateway-1``."""
KEYS_NEEDED = "our public key is not in its trusted/"


def make_pairs(root: Path) -> dict[str, Path]:
    """A pair of its own for each, in a directory as docs/operations.md describes it."""
    pairs = {name: root / name for name in PEERS}
    for directory in pairs.values():
        create_keys(directory)
    for name, trusted in PEERS.items():
        for each in trusted:
            shutil.copy(pairs[each] / "service.key", pairs[name] / "trusted" / f"{each}.key")
    for name in PEERS.keys() - {"index"}:
        shutil.copy(pairs["index"] / "service.key", pairs[name] / "index.key")
    for name in ("gateway", "gateway-1"):
        for router in ("router", "router-1"):
            shutil.copy(pairs[router] / "service.key", pairs[name] / f"{router}.key")
    (pairs["index"] / "operators").mkdir()
    shutil.copy(pairs["operator"] / "service.key", pairs["index"] / "operators" / "alice.key")
    return pairs


def command(mesh: MeshProcesses, keys: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """``microserve ...`` by who holds ``keys``."""
    environment = {
        **os.environ,
        "MICROSERVE_BUS__CURVE_DIR": str(keys),
        "MICROSERVE_INDEX__ADDRESS": mesh.index_address,
    }
    line = [sys.executable, "-m", "microserve.services.command.main", *arguments]
    return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_each_service_has_a_pair_of_its_own(tiny_model: Path, tmp_path: Path) -> None:
    pairs = make_pairs(tmp_path / "keys")
    own = {name: [f"bus.curve_dir={directory}"] for name, directory in pairs.items()}
    for name in ("gateway", "gateway-1"):
        own[name].append('gateway.router_keys=["router", "router-1"]')
    prompt = list(range(20, 120))
    with MeshProcesses(
        tiny_model, tmp_path, num_routers=2, gateway=True, settings=["model.dtype=float32"], own_settings=own
    ) as mesh:
        asyncio.run(_wait_served(mesh))
        url = f"http://127.0.0.1:{mesh.gateway_port}"
        [expected] = oracle(tiny_model, [Case(tuple(prompt), GREEDY)])
        assert expected is not None
        body = {"model": "tiny", "prompt": prompt, "max_tokens": 6, "temperature": 0.0, "ignore_eos": True}
        for strategy in ("data_parallel", "disaggregated"):
            headers = {"x-microserve-strategy": strategy}
            answer = httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=60.0)
            text = Tokenizer.from_file(str(tiny_model / "tokenizer.json")).decode(expected)
            assert answer.json()["choices"][0]["text"] == text

        listed = command(mesh, pairs["operator"], "strategy", "list")
        assert listed.returncode == 0 and {"router", "router-1"} <= set(listed.stdout.split())
        labelled = command(mesh, pairs["operator"], "label", "engine-0", "prefill")
        assert (labelled.returncode, labelled.stderr) == (0, "")
        drained = command(mesh, pairs["operator"], "drain", "engine-1")
        assert drained.returncode == 0, drained.stderr
        assert drained.stdout.endswith("engine engine-1 has left\n")

        # The pair of one whom nobody trusts: silence, and a line that says so, within the bounds.
        with ThreadPoolExecutor() as pool:  # each waits until nobody can be expected to answer: both at once
            asked = [
                pool.submit(command, mesh, pairs["gateway-1"], *arguments)
                for arguments in (["strategy", "list"], ["drain", "engine-0"])
            ]
        for refused in (each.result() for each in asked):
            assert refused.returncode == 1
            assert "does not answer" in refused.stderr and KEYS_NEEDED in refused.stderr
        mesh.start("gateway-1")
        stranger = f"http://127.0.0.1:{mesh.gateway_ports['gateway-1']}"
        assert httpx.post(f"{stranger}/v1/completions", json=body, timeout=60.0).status_code == 503
        assert httpx.post(f"{url}/v1/completions", json=body, timeout=60.0).status_code == 200


async def _wait_served(mesh: MeshProcesses) -> None:
    """Until the gateway knows a router with both engines, and both routers."""
    async with asyncio.timeout(60), httpx.AsyncClient() as client:
        while True:
            ready = await client.get(f"http://127.0.0.1:{mesh.gateway_port}/ready")
            routers = ready.json().get("routers", [])
            if len(routers) == 2 and all(each["num_engines"] == 2 for each in routers):
                return
            await asyncio.sleep(0.1)
