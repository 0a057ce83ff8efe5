"""Two routers and two gateways at once: they share the load, agree on every token, and outlive each other."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

import openai
import pytest

from microserve.protocol import log
from tests.support.process.processes import MeshProcesses

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

NUM_REQUESTS = 24


async def ask(client: openai.AsyncOpenAI, number: int, started: asyncio.Event | None) -> str:
    """The text of one streamed request, without a retry: any error fails the test."""
    stream = await client.completions.create(
        model="tiny",
        prompt=[20 + number % 6, 31, 42, 53],
        max_tokens=100,
        temperature=1.0,
        seed=number % 6,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    text = ""
    async for chunk in stream:
        text += "".join(choice.text for choice in chunk.choices)
        if started is not None:
            started.set()
    return text


async def ask_all(
    clients: list[openai.AsyncOpenAI], started: asyncio.Event | None = None
) -> dict[int, set[str]]:
    """Texts by kind of request: each kind has one right answer."""
    numbers = range(NUM_REQUESTS)
    texts = await asyncio.gather(*(ask(clients[number % 2], number // 2, started) for number in numbers))
    told: dict[int, set[str]] = {}
    for number, text in zip(numbers, texts, strict=True):
        told.setdefault(number // 2 % 6, set()).add(text)
    return told


def finished(mesh: MeshProcesses, name: str) -> int:
    return Counter(str(event.get("event")) for event in mesh.events(name))[log.REQUEST_FINISHED]


def continued(mesh: MeshProcesses, name: str) -> int:
    return Counter(str(event.get("event")) for event in mesh.events(name))[log.REQUEST_CONTINUED]


def test_they_share_the_load_and_outlive_each_other(tiny_model: Path, tmp_path: Path) -> None:
    with MeshProcesses(tiny_model, tmp_path, num_engines=2, num_routers=2, gateway=True) as mesh:
        mesh.start("gateway-1")
        clients = [
            openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
            for port in mesh.gateway_ports.values()
        ]

        async def main() -> None:
            first = await ask_all(clients)
            assert all(len(texts) == 1 for texts in first.values()), "both gateways tell the same"
            shares = {name: finished(mesh, name) for name in mesh.router_addresses}
            assert sum(shares.values()) == NUM_REQUESTS
            assert min(shares.values()) >= NUM_REQUESTS // 6, shares

            started = asyncio.Event()
            asking = asyncio.ensure_future(ask_all(clients, started))
            await started.wait()
            mesh.services["router-1"].kill()
            assert await asking == first, "its requests went on at the other one"
            assert await ask_all(clients) == first, "one router is enough"
            assert sum(continued(mesh, name) for name in ("gateway", "gateway-1")) > 0

            mesh.start("router-1")
            mesh.services["gateway-1"].kill()
            mesh.start("gateway-1")
            assert await ask_all(clients) == first
            for client in clients:
                await client.close()

        asyncio.run(main())
