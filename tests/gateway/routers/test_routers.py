"""The bus side: which router, what happens when it goes, and what it may not do to us."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import httpx
import pytest
from tokenizers import Tokenizer

from microserve.gateway.generation import group as choice_group
from microserve.gateway.routers.client import RouterClient
from microserve.protocol.bus.codec import ROUTER_REQUEST
from microserve.protocol.bus.curve import create_keys
from microserve.protocol.bus.transport import Bus, ClientSocket, DisconnectHandler, FramesHandler
from microserve.protocol.errors import ConfigError
from microserve.protocol.messages.router import GatewayHello, Output, RouterRequest
from tests.support.gateway.gateway_world import (
    BEAT_S,
    QUICK_LOSS,
    GatewayWorld,
    ScriptedRouter,
    gateway_world,
    post,
    run,
)


def http_of(world: GatewayWorld) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=world.address, timeout=20.0)


async def ask(world: GatewayWorld) -> httpx.Response:
    async with http_of(world) as http:
        return await http.post("/v1/completions", json={"model": "tiny", "prompt": "x"})


async def until_ready(world: GatewayWorld, wanted: int) -> None:
    async with http_of(world) as http:
        while (await http.get("/ready")).status_code != wanted:
            await asyncio.sleep(BEAT_S / 5)


def answering(router: ScriptedRouter, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("ok").ids
    router.answer = lambda served: served.send(ids, ended=served.ended("length"))


@pytest.mark.slow
def test_a_router_that_stays_silent_ends_its_requests_and_is_found_again(
    model: Path, raw_tokenizer: Tokenizer
) -> None:
    async def main() -> None:
        async with gateway_world(model, QUICK_LOSS) as world:
            plain = asyncio.ensure_future(ask(world))
            await world.router.request()
            async with post(world, "/v1/completions", prompt="y", stream=True) as stream:
                streamed = await world.router.request()
                streamed.send(raw_tokenizer.encode("abc").ids)
                await stream.head()
                await stream.chunk()
                world.router.joined.clear()
                world.router.silent = True
                reply = await plain
                assert (reply.status_code, reply.json()["error"]["code"]) == (503, "router_lost")
                assert reply.headers["retry-after"] == "1"
                assert [event["error"]["code"] for event in await stream.events()] == ["router_lost"]
            world.router.silent = False
            answering(world.router, raw_tokenizer)
            await world.router.joined.wait()
            await until_ready(world, 200)
            assert (await ask(world)).json()["choices"][0]["text"] == "ok"

    run(main())


@pytest.mark.slow
def test_a_pause_of_our_own_is_not_the_routers_silence(model: Path, raw_tokenizer: Tokenizer) -> None:
    """What the router said meanwhile still waits in the socket, unread."""

    async def main() -> None:
        async with gateway_world(model, "bus.liveness=4") as world:
            call = asyncio.ensure_future(ask(world))
            served = await world.router.request()
            for _ in range(3):
                time.sleep(8 * BEAT_S)  # noqa: ASYNC251  (the process stands still)
                await world.router.next_beat()
            served.send(raw_tokenizer.encode("ok").ids, ended=served.ended("length"))
            assert (await call).json()["choices"][0]["text"] == "ok"

    run(main())


def test_a_bus_with_keys(model: Path, raw_tokenizer: Tokenizer, tmp_path: Path) -> None:
    async def main() -> None:
        keys = create_keys(tmp_path / "keys")
        async with gateway_world(model, f"bus.curve_dir={tmp_path / 'keys'}", keys=keys) as world:
            answering(world.router, raw_tokenizer)
            assert (await ask(world)).status_code == 200

    run(main())


def test_a_router_that_comes_later_is_found(model: Path, raw_tokenizer: Tokenizer) -> None:
    async def main() -> None:
        async with gateway_world(model, QUICK_LOSS, wait_ready=False, silent=True) as world:
            reply = await ask(world)
            assert (reply.status_code, reply.json()["error"]["code"]) == (503, "no_engines")
            await until_ready(world, 503)
            world.router.silent = False
            answering(world.router, raw_tokenizer)
            await until_ready(world, 200)
            assert (await ask(world)).status_code == 200

    run(main())


class DeafBus:
    """A bus whose every peer is away: it keeps what would wait in the sockets' queues."""

    def __init__(self, enough: int) -> None:
        self.queues: list[list[RouterRequest]] = []
        self.num_open = 0
        self.enough = asyncio.Event()
        self._enough = enough

    def client(
        self,
        address: str,
        handler: FramesHandler,
        *,
        server_key: str = "",
        on_disconnect: DisconnectHandler | None = None,
    ) -> ClientSocket:
        self.num_open += 1
        queue: list[RouterRequest] = []
        self.queues.append(queue)
        bus = self
        if len(self.queues) == self._enough:
            self.enough.set()

        class Socket:
            def send(self, frames: Sequence[bytes]) -> bool:
                queue.append(ROUTER_REQUEST.decode([frames[0][:2], *frames[1:]])[0])
                return True

            def close(self, *, lingers: bool = True) -> None:
                bus.num_open -= 1

        return Socket()


def test_hellos_do_not_pile_up_at_a_router_that_is_not_there() -> None:
    async def main() -> None:
        bus = DeafBus(enough=4)
        routers = RouterClient(
            cast(Bus, bus),
            ["tcp://127.0.0.1:1"],
            gateway_id="g",
            incarnation=1,
            model="m",
            credit=8,
            heartbeat_interval_s=0.005,
            liveness=2,
            clock=time.monotonic,
        )
        routers.start()
        await bus.enough.wait()
        assert bus.num_open == 1
        assert [[type(message) for message in queue] for queue in bus.queues] == [[GatewayHello]] * 4
        await routers.close()
        assert bus.num_open == 0

    run(main())


def test_without_engines_there_is_nothing_to_ask(model: Path, raw_tokenizer: Tokenizer) -> None:
    async def main() -> None:
        async with gateway_world(model, num_engines=0) as world:
            reply = await ask(world)
            assert (reply.status_code, reply.json()["error"]["code"]) == (503, "no_engines")
            await until_ready(world, 503)
            world.router.num_engines = 2
            answering(world.router, raw_tokenizer)
            await until_ready(world, 200)
            assert (await ask(world)).status_code == 200

    run(main())


def test_a_router_of_another_model_is_not_asked(model: Path) -> None:
    async def main() -> None:
        async with gateway_world(model, model="other") as world:
            reply = await ask(world)
            assert reply.status_code == 503
            assert "serve other" in reply.json()["error"]["message"]

    run(main())


def test_requests_go_where_fewest_are(model: Path, raw_tokenizer: Tokenizer) -> None:
    async def main() -> None:
        async with gateway_world(model, QUICK_LOSS, num_routers=2) as world:
            one, two = world.routers
            calls = [asyncio.ensure_future(ask(world)) for _ in range(4)]
            requests = [await router.request() for router in (one, two) for _ in range(2)]
            assert (len(one.served), len(two.served)) == (2, 2)
            for served in requests:
                served.end("length")
            assert [(await call).status_code for call in calls] == [200] * 4
            one.silent = True
            async with http_of(world) as http:
                while (await http.get("/ready")).json()["routers"][0]["alive"]:
                    await asyncio.sleep(BEAT_S / 5)
            answering(two, raw_tokenizer)
            assert (await ask(world)).status_code == 200

    run(main())


def test_repeated_tokens_are_dropped_and_a_gap_is_an_error(model: Path, raw_tokenizer: Tokenizer) -> None:
    async def main() -> None:
        async with gateway_world(model) as world:
            ids = raw_tokenizer.encode("abcd").ids
            call = asyncio.ensure_future(ask(world))
            served = await world.router.request()
            for offset, tokens in ((0, ids[:2]), (0, ids[:2]), (1, ids[1:3]), (3, ids[3:]), (2, ids[2:])):
                served.send(tokens, offset=offset)
            served.end("length")
            assert (await call).json()["choices"][0]["text"] == "abcd"

            call = asyncio.ensure_future(ask(world))
            served = await world.router.request()
            served.send(ids[:1], offset=0)
            served.send(ids[2:], offset=2)
            await served.cancelled.wait()
            reply = await call
            assert (reply.status_code, reply.json()["error"]["code"]) == (502, "protocol_violation")

    run(main())


def test_a_request_that_nobody_waits_for_is_cancelled(model: Path) -> None:
    async def main() -> None:
        async with gateway_world(model) as world:
            call = asyncio.ensure_future(ask(world))
            served = await world.router.request()
            world.router.stream(served.peer, Output("left over from another life", 0, [1]))
            served.end("length")
            assert (await call).status_code == 200
            while not world.router.cancels:
                await asyncio.sleep(0)
            assert world.router.cancels == ["left over from another life"]

    run(main())


def test_junk_from_a_router_is_dropped(model: Path, raw_tokenizer: Tokenizer) -> None:
    async def main() -> None:
        async with gateway_world(model) as world:
            call = asyncio.ensure_future(ask(world))
            served = await world.router.request()
            for frames in ([b""], [b"\x01\x04"], [b"\x01\x04", b"\xff"], [b"\x02\x04", b"\x90"], [b"x"] * 9):
                world.router.send_raw(served.peer, frames)
            served.send(raw_tokenizer.encode("ok").ids, ended=served.ended("length"))
            assert (await call).json()["choices"][0]["text"] == "ok"

    run(main())


def test_a_router_that_never_answers_meets_the_deadline(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice_group, "DEADLINE_GRACE_S", 0.05)

    async def main() -> None:
        async with gateway_world(model) as world, http_of(world) as http:
            body = {"model": "tiny", "prompt": "x"}
            call = http.post("/v1/completions", json=body, headers={"x-microserve-timeout-s": "0.05"})
            task = asyncio.ensure_future(call)
            served = await world.router.request()
            await served.cancelled.wait()
            reply = await task
            assert (reply.status_code, reply.json()["error"]["code"]) == (504, "deadline_exceeded")

    run(main())


def test_an_address_that_is_none_is_a_wrong_setting(model: Path) -> None:
    async def main() -> None:
        async with gateway_world(model, 'gateway.routers=["nowhere"]'):
            pass

    with pytest.raises(ConfigError) as caught:
        run(main())
    assert caught.value.field == "gateway.routers"
