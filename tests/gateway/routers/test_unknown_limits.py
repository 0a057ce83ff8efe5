"""While nobody says what the model can hold, nobody is refused for its length: 503, and later is better."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest

from tests.support.gateway.gateway_world import QUICK_LOSS, GatewayWorld, ScriptedRouter, gateway_world, run


async def ask(world: GatewayWorld) -> httpx.Response:
    async with httpx.AsyncClient(base_url=world.address, timeout=20.0) as http:
        return await http.post("/v1/completions", json={"model": "tiny", "prompt": "A"})


async def two_beats(router: ScriptedRouter) -> None:
    """What the router says now is known to the gateway after the second."""
    for _ in range(2):
        await router.next_beat()
    await asyncio.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("known_before", [True, False])
@pytest.mark.parametrize("router_restarts", [True, False])
def test_while_all_engines_are_away(model: Path, known_before: bool, router_restarts: bool) -> None:
    """Their router goes on naming the model, with a length of 0 (the least of no engines)."""

    async def main() -> None:
        async with gateway_world(model, QUICK_LOSS, num_engines=1 if known_before else 0) as world:
            router = world.router
            if not known_before:
                router.max_model_len = router.vocab_size = 0
            await two_beats(router)
            router.num_engines = router.max_model_len = 0
            await two_beats(router)
            if router_restarts:
                router.incarnation += 1
                await two_beats(router)
            reply = await ask(world)
            error = reply.json()["error"]
            assert (reply.status_code, error["code"]) == (503, "no_engines"), error
            assert int(reply.headers["retry-after"]) >= 1
            assert router.served == {}
            # Back again: as if nothing had been.
            router.num_engines, router.max_model_len, router.vocab_size = 1, 512, 300
            router.answer = lambda served: served.end("length")
            await two_beats(router)
            assert (await ask(world)).status_code == 200

    run(main())
