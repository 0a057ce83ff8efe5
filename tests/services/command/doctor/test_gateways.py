"""A doctor asks gateways over HTTP, and knows from routers where they are."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from microserve.protocol.bus.codec import INDEX_REQUEST
from microserve.protocol.messages.host import HostFacts
from microserve.protocol.messages.index import Watch
from microserve.protocol.process.host import host_facts
from microserve.services.command.doctor.gateways import ask_gateway, urls_from_here
from microserve.services.command.doctor.judging import judge
from microserve.services.command.doctor.look import look
from microserve.services.command.doctor.observation import Observation, Place, Reach
from tests.support.engine.engine_world import engine_world
from tests.support.gateway.gateway_world import gateway_world, make_model, run
from tests.support.router.router_world import in_loop

HERE = "tcp://127.0.0.1:7001"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


def test_a_gateway_says_that_it_serves_its_version_and_the_time(model: Path) -> None:
    async def main() -> None:
        async with gateway_world(model) as world:
            assert world.router.url == world.address
            seen = await ask_gateway(world.address, "")
            assert (seen.place.reach, seen.error, seen.unready) == (Reach.REACHED, "", "")
            assert seen.version and seen.host is not None and seen.host.clock_off_s is not None
            assert abs(seen.host.clock_off_s) <= seen.host.uncertain_s + 0.01  # both are of one clock
            world.router.num_engines = 0
            for _ in range(2):
                await world.router.next_beat()
            async with asyncio.timeout(30.0):
                while not (seen := await ask_gateway(world.address, "")).unready:
                    pass
            assert seen.unready == "its routers have no engine"

    run(main())


def test_what_is_no_gateway_is_told_apart_from_nobody() -> None:
    async def main() -> None:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            if await reader.readline():
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi")
                await writer.drain()
            writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with server:
            assert "is no gateway's" in (await ask_gateway(url, "")).error
        assert (await ask_gateway(url, "")).place.reach is Reach.REFUSED
        assert (await ask_gateway("http://no..name:1", "")).place.reach is Reach.NO_ADDRESS
        assert (await ask_gateway("ftp://h", "")).place.reach is Reach.NO_ADDRESS
        lost = Observation(Place("index", HERE, Reach.REFUSED), gateways=[await ask_gateway(url, "")])
        assert {finding.where for finding in judge(lost)} >= {f"gateway, HTTP, {url}"}

    run(main())


def test_each_is_asked_once_and_none_that_serves_another_host_alone() -> None:
    near, far = "http://127.0.0.1:80", "http://192.0.2.7:80"
    assert urls_from_here([near, far, near], [f"{far}/", ""], HERE) == [far, near]
    assert urls_from_here([near, far], [], "tcp://192.0.2.1:7001") == [far]


@in_loop
async def test_a_router_tells_of_its_gateways_its_version_and_its_clock() -> None:
    async with engine_world() as world:
        facts = host_facts()
        ahead = HostFacts(time.time() + 3600.0, facts.num_descriptors, 300)
        router = world.bus.client(world.settings.index.address, lambda _: None)
        gone = "http://127.0.0.1:1"
        router.send(INDEX_REQUEST.encode(Watch("r0", 0, gateways=[gone], version="0.0.1", host=ahead)))
        try:
            async with asyncio.timeout(30.0):
                while not (seen := await look(world.settings, tries=False, tell=lambda _: None)).routers:
                    pass
        finally:
            router.close()
        findings = {(finding.name, finding.where) for finding in judge(seen)}
        assert findings == {
            ("clock_off", "router r0"),
            ("few_descriptors", "router r0"),
            ("versions_differ", "this mesh"),
            ("port_closed", f"gateway, HTTP, {gone}"),
        }
