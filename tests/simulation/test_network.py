"""Simulated sockets behave as ZeroMQ's do, and fail as networks do."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine

from microserve.services.simulation.bus import Addresses, SimBus
from microserve.services.simulation.loop import Process, VirtualLoop
from microserve.services.simulation.network import CalmNetwork, Endpoint, Network, Weather


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


def test_in_a_calm_network_a_message_more_changes_nothing_for_the_others() -> None:
    def arrivals(seed: int, signs_of_life: bool) -> list[tuple[str, float]]:
        arrived: list[tuple[str, float]] = []

        async def main(loop: VirtualLoop) -> None:
            network = CalmNetwork(loop, random.Random(1), seed)
            here, there = Process(loop, "here"), Process(loop, "there")

            def deliver(frames: list[bytes]) -> None:
                arrived.append((frames[0].decode(), loop.now))

            way, way_back = Endpoint(there, deliver), Endpoint(here, deliver)
            for number in range(50):
                for source, endpoint, name in ((here, way, "asked"), (there, way_back, "answered")):
                    network.carry(source, endpoint, [b"%s %d" % (name.encode(), number)])
                    network.carry(source, endpoint, [b"%s %d, more" % (name.encode(), number)])
                await asyncio.sleep(0.001)
                if signs_of_life:
                    network.carry(here, way, [b"alive"])
                await asyncio.sleep(0.01)

        run(main)
        return [(what, at_s) for what, at_s in arrived if what != "alive"]

    plain = arrivals(1, signs_of_life=False)
    asked = [what for what, _ in plain if what.startswith("asked")]
    assert asked == [f"asked {number}{more}" for number in range(50) for more in ("", ", more")]
    assert arrivals(1, signs_of_life=True) == plain != arrivals(2, signs_of_life=False)
    latencies = sorted(at_s - 0.011 * round(at_s / 0.011) for _, at_s in plain)
    assert 5e-5 <= latencies[0] < 1e-4 and 4.5e-4 < latencies[-1] <= 5.001e-4
