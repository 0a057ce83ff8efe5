"""Requests outlive their router: they go on at another, or in its next life, as one stream."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import httpx
import pytest
from tokenizers import Tokenizer

from microserve.gateway.routers import failover as moving
from microserve.protocol.bus.numbered import NumberedServer
from tests.support.gateway.gateway_world import (
    BEAT_S,
    GatewayWorld,
    ScriptedRouter,
    Served,
    gateway_world,
    post,
    run,
)

NEVER_SILENT = "bus.liveness=100000"
"""What is tested here is found at once."""


async def ask(world: GatewayWorld, prompt: str = "x") -> httpx.Response:
    async with httpx.AsyncClient(base_url=world.address, timeout=20.0) as http:
        return await http.post("/v1/completions", json={"model": "tiny", "prompt": prompt})


async def moved_to(router: ScriptedRouter) -> Served:
    served = await router.request()
    served.sent = served.message.num_output_tokens
    return served


async def lose(router: ScriptedRouter, how: str) -> None:
    match how:
        case "restarted":
            router.incarnation += 1
        case "forgot us":
            router.forget()
        case "messages lost":
            router.lossy.lose_next_down()
        case "closed the connection":
            router.forget()
            router._socket.close()  # it is closed in the background
            while True:
                with contextlib.suppress(OSError):
                    router._socket = NumberedServer(
                        router.lossy, router.address, router._on_frames, lambda peer: None
                    )
                    break
                await asyncio.sleep(0.005)


@pytest.mark.parametrize("how", ["restarted", "forgot us", "messages lost", "closed the connection"])
def test_requests_of_a_lost_router_go_on_in_its_next_life(
    model: Path, raw_tokenizer: Tokenizer, how: str
) -> None:
    first, rest = raw_tokenizer.encode("abc").ids, raw_tokenizer.encode("def").ids

    async def main() -> None:
        async with gateway_world(model, NEVER_SILENT) as world:
            router = world.router
            plain = asyncio.ensure_future(ask(world))
            before = await router.request()
            async with post(world, "/v1/completions", prompt="y", stream=True) as stream:
                streamed = await router.request()
                streamed.send(first)
                await stream.head()
                await stream.chunk()
                await lose(router, how)
                moved = [await moved_to(router), await moved_to(router)]
                again = {served.message.num_output_tokens: served for served in moved}
                assert again[0].tokens == before.tokens
                assert again[len(first)].tokens == [*streamed.tokens, *first]
                assert again[len(first)].message.sampling == streamed.message.sampling
                # Whose the output is, so that no other model goes on with it.
                assert [again[n].message.revision for n in (0, len(first))] == ["", "r1"]
                assert len({served.message.request_id for served in (before, streamed, *moved)}) == 4
                if streamed.peer in router.windows:  # nobody listens to the old one
                    streamed.send(rest, ended=streamed.ended("length"))
                again[0].send(rest, ended=again[0].ended("length"))
                again[len(first)].send(rest, ended=again[len(first)].ended("length"))
                assert (await plain).json()["choices"][0]["text"] == "def"
                events = await stream.events()
                assert events[-1] == "[DONE]"
                text = "".join(event["choices"][0]["text"] for event in events[:-1] if event["choices"])
                assert text.endswith("def")

    run(main())


def test_a_router_that_stops_hands_its_requests_to_another(model: Path, raw_tokenizer: Tokenizer) -> None:
    async def main() -> None:
        async with gateway_world(model, NEVER_SILENT, num_routers=2) as world:
            one, two = world.routers
            calls = [asyncio.ensure_future(ask(world)) for _ in range(2)]
            here, there = await one.request(), await two.request()
            here.send(raw_tokenizer.encode("ab").ids)
            here.end("error", code="draining", detail="the router stops", retry_after_s=1.0)
            moved = await moved_to(two)
            assert moved.tokens == [*here.tokens, *raw_tokenizer.encode("ab").ids]
            moved.send(raw_tokenizer.encode("c").ids, ended=moved.ended("length"))
            there.send(raw_tokenizer.encode("z").ids, ended=there.ended("length"))
            texts = {(await call).json()["choices"][0]["text"] for call in calls}
            assert texts == {"abc", "z"}

    run(main())


def test_a_request_that_comes_while_the_router_is_away_waits_for_it(
    model: Path, raw_tokenizer: Tokenizer
) -> None:
    async def main() -> None:
        async with gateway_world(model, NEVER_SILENT) as world:
            router = world.router
            known = router.model, router.max_model_len, router.vocab_size
            # Its next life has to find the engines first, and knows nothing of the model until then.
            router.num_engines, router.model, router.max_model_len, router.vocab_size = 0, "", 0, 0
            await lose(router, "restarted")
            await router.next_beat()
            await router.next_beat()
            call = asyncio.ensure_future(ask(world))
            await router.next_beat()
            assert not router.served
            assert not call.done(), "what is known of the model is still true"
            router.num_engines = 1
            router.model, router.max_model_len, router.vocab_size = known
            served = await router.request()
            served.send(raw_tokenizer.encode("ok").ids, ended=served.ended("length"))
            assert (await call).json()["choices"][0]["text"] == "ok"

    run(main())


def test_a_request_outlives_so_many_routers_and_no_more(model: Path) -> None:
    """It may be the request that ends them."""

    async def main() -> None:
        async with gateway_world(model, NEVER_SILENT) as world:
            call = asyncio.ensure_future(ask(world))
            await world.router.request()
            for _ in range(moving.MAX_MOVES):
                await lose(world.router, "restarted")
                await moved_to(world.router)
            await lose(world.router, "restarted")
            assert (await call).status_code == 503

    run(main())


def test_a_client_that_leaves_meanwhile_is_not_served_elsewhere(model: Path) -> None:
    async def main() -> None:
        async with gateway_world(model, NEVER_SILENT) as world:
            async with post(world, "/v1/completions", prompt="y", stream=True):
                await world.router.request()
                world.router.num_engines = 0  # nowhere to go for now
                await world.router.next_beat()
                await lose(world.router, "forgot us")
                await asyncio.sleep(2 * BEAT_S)
            await world.router.next_beat()
            world.router.num_engines = 1
            await world.router.next_beat()
            await world.router.next_beat()
            assert len(world.router.served) == 1

    run(main())


def test_prompts_beyond_the_budget_end_with_their_router(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moving, "MAX_PROMPT_NBYTES", 8)

    async def main() -> None:
        async with gateway_world(model, NEVER_SILENT) as world:
            call = asyncio.ensure_future(ask(world, "a prompt of more than two tokens"))
            await world.router.request()
            await lose(world.router, "restarted")
            reply = await call
            assert (reply.status_code, reply.json()["error"]["code"]) == (503, "router_lost")

    run(main())


def test_a_request_that_cannot_be_sent_ends_alone(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is wrong with it: the others go on, and the gateway lives."""
    send = moving.Moves._send

    def fail(self: moving.Moves, link: Any, mailbox: Any, kept: Any, now: float) -> bool:
        if kept.message.sampling.max_tokens == 7:
            raise OverflowError("too large for the wire")
        return send(self, link, mailbox, kept, now)

    monkeypatch.setattr(moving.Moves, "_send", fail)

    async def main() -> None:
        async with gateway_world(model, NEVER_SILENT) as world:
            router = world.router
            async with (
                post(world, "/v1/completions", prompt="x", max_tokens=7) as sick,
                post(world, "/v1/completions", prompt="x", max_tokens=8) as well,
            ):
                for _ in range(2):
                    await router.request()
                await lose(router, "restarted")
                assert (await sick.head())[0] == 500
                (await moved_to(router)).end("length")
                assert (await well.head())[0] == 200

    run(main())
