"""Simulated sockets behave as ZeroMQ's do, and fail as networks do."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine

from microserve.services.simulation.bus import Addresses, SimBus
from microserve.services.simulation.loop import Process, VirtualLoop
from microserve.services.simulation.network import Network, Weather


class Pair:
    """A server process that answers with what it got, and a client process."""

    def __init__(self, loop: VirtualLoop) -> None:
        self.network = Network(loop, random.Random(1))
        self.addresses = Addresses(self.network)
        self.there, self.here = Process(loop, "there"), Process(loop, "here")
        self.asked: list[bytes] = []
        self.answers: list[bytes] = []
        self.disconnects = 0
        self.listen()
        self.client = SimBus(self.addresses, self.here).client(
            "sim://there", lambda frames: self.answers.append(frames[0]), on_disconnect=self._disconnected
        )

    def listen(self) -> None:
        def answer(peer: bytes, frames: list[bytes]) -> None:
            self.asked.append(frames[0])
            self.server.send(peer, frames)

        self.server = SimBus(self.addresses, self.there).server("sim://there", answer)

    def _disconnected(self) -> None:
        self.disconnects += 1


def run(test: Callable[[VirtualLoop], Coroutine[None, None, None]]) -> None:
    loop = VirtualLoop()
    loop.run(test(loop))
    assert not loop.failures


def test_messages_come_in_order_and_wait_for_the_server() -> None:
    async def main(loop: VirtualLoop) -> None:
        pair = Pair(loop)
        pair.server.close()
        sent = [b"%d" % number for number in range(50)]
        for message in sent:
            assert pair.client.send([message])
        await asyncio.sleep(1.0)
        assert not pair.asked
        pair.listen()
        await asyncio.sleep(1.0)
        assert pair.asked == pair.answers == sent

    run(main)


def test_a_dead_server_is_noticed_and_a_new_one_found() -> None:
    async def main(loop: VirtualLoop) -> None:
        pair = Pair(loop)
        await asyncio.sleep(0.1)
        pair.client.send([b"lost with its server"])
        pair.there.kill()
        pair.addresses.crash(pair.there)
        await asyncio.sleep(0.1)
        assert pair.disconnects == 1
        assert not pair.asked
        pair.there = Process(loop, "there")
        pair.listen()
        pair.client.send([b"again"])
        await asyncio.sleep(0.2)
        assert pair.answers == [b"again"]

    run(main)


def test_one_way_is_blocked_and_the_other_free() -> None:
    async def main(loop: VirtualLoop) -> None:
        pair = Pair(loop)
        await asyncio.sleep(0.1)
        pair.network.block("there", "here", lossy=False)
        pair.client.send([b"held"])
        await asyncio.sleep(1.0)
        assert pair.asked == [b"held"]
        assert not pair.answers
        pair.network.unblock("there", "here")
        await asyncio.sleep(0.1)
        assert pair.answers == [b"held"]
        pair.network.block("here", "there", lossy=True)
        pair.client.send([b"lost"])
        pair.network.unblock_all()
        await asyncio.sleep(0.1)
        assert pair.asked == [b"held"]

    run(main)


def test_weather_drops_doubles_and_reorders_as_often_as_it_says() -> None:
    async def main(loop: VirtualLoop) -> None:
        pair = Pair(loop)
        await asyncio.sleep(0.1)
        pair.network.weather = Weather(drop=0.2, duplicate=0.2, reorder=0.2, delay=0.2)
        sent = [b"%03d" % number for number in range(500)]
        for message in sent:
            pair.client.send([message])
        await asyncio.sleep(5.0)
        assert 300 < len(set(pair.asked)) < 480
        assert len(pair.asked) > len(set(pair.asked))
        assert pair.asked != sorted(pair.asked)
        assert all(pair.network.faults[kind] > 50 for kind in ("drop", "duplicate", "reorder", "delay"))

    run(main)


def test_a_client_that_closes_without_lingering_drops_what_is_on_its_way() -> None:
    async def main(loop: VirtualLoop) -> None:
        for lingers in (True, False):
            pair = Pair(loop)
            assert pair.client.send([b"first"])
            await asyncio.sleep(1.0)
            assert pair.client.send([b"last"])
            pair.client.close(lingers=lingers)
            await asyncio.sleep(1.0)
            assert pair.asked == ([b"first", b"last"] if lingers else [b"first"])
            assert pair.server.sender_key == ""
            pair.server.close()

    run(main)
