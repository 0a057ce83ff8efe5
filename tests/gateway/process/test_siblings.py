"""Workers of one gateway: what is divided among them, and one scrape that has what all of them measured."""

from __future__ import annotations

import asyncio
import os
import socket
from functools import partial

import pytest
from prometheus_client.core import CounterMetricFamily, Metric

from microserve.gateway import siblings
from microserve.gateway.siblings import Siblings
from microserve.gateway.worker import settings_of_worker
from microserve.protocol.errors import ConfigError
from microserve.protocol.settings.sources import load_settings
from tests.support.gateway.gateway_world import run


def test_a_worker_has_a_name_of_its_own_and_its_part_of_the_room() -> None:
    settings = load_settings(
        overrides=["gateway.workers=3", "gateway.id=g", "gateway.max_streams=100", "gateway.max_n=5"]
    )
    made = [settings_of_worker(settings, number).gateway for number in range(3)]
    assert [each.id for each in made] == ["g-0", "g-1", "g-2"]
    assert {each.max_streams for each in made} == {34}
    assert {(each.max_connections, each.max_n) for each in made} == {(0, 5)}
    with pytest.raises(ConfigError):
        settings_of_worker(settings, 3)


async def counted(name: str, value: float) -> list[Metric]:
    family = CounterMetricFamily(name, "text", labels=["code"])
    family.add_metric(["ok"], value)
    return [family]


def values(families: list[Metric]) -> dict[tuple[str, str], float]:
    return {(each.name, each.labels["worker"]): each.value for made in families for each in made.samples}


def test_any_worker_tells_of_all() -> None:
    async def main() -> None:
        address = f"test-{id(main)}"
        workers = [Siblings(address, n, 3, partial(counted, "m", n + 1.0)) for n in range(3)]
        for each in workers:
            await each.start()
        for each in workers:
            families = await each.families()
            assert [family.name for family in families] == ["m"]
            assert values(families) == {("m_total", "0"): 1, ("m_total", "1"): 2, ("m_total", "2"): 3}
            assert families[0].samples[0].labels["code"] == "ok"
        await workers[1].close()
        assert values(await workers[0].families()).keys() == {("m_total", "0"), ("m_total", "2")}
        for each in workers:
            await each.close()

    run(main())


def test_a_sibling_that_stands_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(siblings, "ANSWER_S", 0.05)

    async def main() -> None:
        address = f"test-{id(main)}"
        one = Siblings(address, 0, 2, lambda: counted("m", 1.0))
        await one.start()
        with socket.socket(socket.AF_UNIX) as frozen:
            frozen.bind(f"{one._name}-1")
            frozen.listen()
            assert values(await one.families()) == {("m_total", "0"): 1}
        await one.close()

    run(main())


def test_a_process_of_another_user_is_told_nothing_and_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of names in the abstract namespace only the kernel can say who speaks."""

    async def main() -> None:
        address = f"test-{id(main)}"
        workers = [Siblings(address, n, 2, partial(counted, "m", n + 1.0)) for n in range(2)]
        for each in workers:
            await each.start()
        own = workers[0]._name
        real = os.getuid()
        monkeypatch.setattr(os, "getuid", lambda: real + 1)
        assert values(await workers[0].families()) == {("m_total", "0"): 1}  # who answers is another user
        asking = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        asking.connect(f"{own}-1")
        reader, writer = await asyncio.open_unix_connection(sock=asking)
        assert await reader.read() == b""
        writer.close()
        for each in workers:
            await each.close()

    run(main())


def test_a_name_that_is_taken_costs_only_the_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        one, same = (Siblings("taken", 0, 2, lambda: counted("m", 1.0)) for _ in range(2))
        await one.start()
        await same.start()
        assert values(await same.families()) == {("m_total", "0"): 1}
        await same.close()
        await one.close()

    run(main())
