"""A whole mesh under CURVE: whoever holds a trusted key is served, others are not heard."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from microserve.protocol.bus.curve import CurveKeys, create_keys
from microserve.protocol.bus.transport import ZmqBus
from microserve.protocol.messages.sampling import SamplingParams
from tests.support.bus.bus_client import BusClient
from tests.support.process.processes import MeshProcesses

pytestmark = [pytest.mark.system, pytest.mark.timeout(200)]

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
