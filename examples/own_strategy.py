"""A strategy of one's own, published on a running mesh, changed, and taken back: no restart, no lost request.

    python examples/own_strategy.py tcp://127.0.0.1:7100 http://127.0.0.1:8000

The addresses are the index's and the gateway's. ``microserve strategy publish|rollback|retire`` does the same
from a shell, and first tries the source in a simulation. How strategies are written: docs/strategies.md.
Needs ``pip install httpx``.
"""

from __future__ import annotations

import argparse
import asyncio

import httpx

from microserve.protocol.messages.strategy.control import PUBLISH, RETIRE, ROLLBACK
from microserve.protocol.settings.sources import load_settings
from microserve.services.command.shared.control_client import ControlClient, control_client

NAME = "fewest_sequences"
FIRST = '''
from microserve.services.router.authoring import strategy

@strategy
async def fewest_sequences(mesh, request):
    """Wherever the fewest requests run."""
    engine = mesh.pick(None, request, cost=lambda engine: mesh.load(engine).sequences)
    async for tokens in engine.start_generate(request):
        yield tokens
'''
SECOND = '''
from microserve.services.router.authoring import strategy

@strategy
async def fewest_sequences(mesh, request):
    """As before, with the prompt computed elsewhere where there is another engine."""
    decode = mesh.pick(None, request, cost=lambda engine: mesh.load(engine).sequences)
    prefill = mesh.pick(None, request, exclude=[decode])
    grant = await decode.prep_recv(request)
    prefill.remote_send(request, grant)
    async for tokens in decode.start_generate(request, begin=None, grant=grant):
        yield tokens
'''


async def change(control: ControlClient, kind: str, source: str = "") -> int:
    """One change, until every router has applied it."""
    version = await control.change(kind, NAME, source=source, reason="an example")
    applied = await control.applied(version, NAME, within_s=10.0)
    if applied.undone or applied.late:
        raise SystemExit(f"not applied: {applied.undone or applied.late}")
    print(f"{kind}: version {version}, applied by {len(applied.routers)} router(s)")
    return version


async def ask(http: httpx.AsyncClient) -> int:
    """One request under the strategy; the version that served it."""
    model = (await http.get("/v1/models")).raise_for_status().json()["data"][0]["id"]
    response = await http.post(
        "/v1/completions",
        json={"model": model, "prompt": "Once upon a time", "max_tokens": 8},
        headers={"x-microserve-strategy": NAME},
    )
    version = int(response.raise_for_status().headers["x-microserve-strategy-version"])
    print(f"served by version {version}")
    return version


async def run(index: str, gateway: str) -> None:
    settings = load_settings(overrides=[f"index.address={index}"])
    async with (
        control_client(settings) as control,
        httpx.AsyncClient(base_url=gateway, timeout=60.0) as http,
    ):
        first = await change(control, PUBLISH, source=FIRST)
        assert await ask(http) == first
        second = await change(control, PUBLISH, source=SECOND)
        assert await ask(http) == second
        await change(control, ROLLBACK)
        assert await ask(http) == first
        await change(control, RETIRE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("index")
    parser.add_argument("gateway")
    arguments = parser.parse_args()
    asyncio.run(run(arguments.index, arguments.gateway))


if __name__ == "__main__":
    main()
