"""The port of metrics: what is read there, and that nobody who reads can hold up the service."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from structlog.testing import capture_logs

from microserve.protocol import log
from microserve.protocol.metrics import port as port_room
from microserve.protocol.metrics.family import counter, gauge, histogram
from microserve.protocol.metrics.histogram import Histogram
from microserve.protocol.metrics.port import MAX_CONNECTIONS, MetricsPort
from microserve.protocol.metrics.readings import Readings
from tests.support.process.processes import free_port

RUNNING = gauge("t_running", "Now.", vllm=("num_requests_running", "old_running"))
TOKENS = counter("t_tokens", "Tokens.", "source", vllm="prompt_tokens")
SECONDS = histogram("t_seconds", "Seconds.", bounds=(0.1, 1.0))


def collect() -> Readings:
    readings = Readings({"engine": "e0"})
    readings.add(RUNNING, 3)
    readings.add_each(TOKENS, {"cache": 5, "computed": 7})
    times = Histogram(SECONDS.bounds)
    for seconds in (0.05, 0.1, 0.5, 3.0):
        times.observe(seconds)
    readings.add(SECONDS, times)
    times.observe(9.0)  # what is added later is of the next reading
    return readings


def run(
    main: Callable[[MetricsPort], Coroutine[Any, Any, None]], read: Callable[[], Readings] = collect
) -> None:
    async def opened() -> None:
        with MetricsPort("127.0.0.1", free_port(), read) as port:
            await main(port)

    asyncio.run(opened())


def samples(text: str) -> dict[tuple[str, tuple[str, ...]], float]:
    return {
        (sample.name, tuple(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_names_are_ours_or_vllms_for_the_same_numbers() -> None:
    async def main(port: MetricsPort) -> None:
        async with httpx.AsyncClient(base_url=f"http://{port.address}", timeout=30) as http:
            ours = await http.get("/metrics")
            theirs = samples((await http.get("/metrics?names=vllm")).text)
            assert ours.headers["content-type"].startswith("text/plain; version=0.0.4")
            found = samples(ours.text)
            assert found["t_running", ("e0",)] == 3
            assert found["t_tokens_total", ("e0", "computed")] == 7
            assert [found["t_seconds_bucket", ("e0", le)] for le in ("0.1", "1.0", "+Inf")] == [2, 3, 4]
            assert (found["t_seconds_count", ("e0",)], found["t_seconds_sum", ("e0",)]) == (4, 3.65)
            assert ("process_cpu_seconds_total", ()) in found
            assert theirs["vllm:num_requests_running", ("e0",)] == theirs["vllm:old_running", ("e0",)] == 3
            assert theirs["vllm:prompt_tokens_total", ("e0", "cache")] == 5
            assert theirs["t_seconds_count", ("e0",)] == 4 and ("t_running", ("e0",)) not in theirs
            assert (await http.get("/health")).status_code == 200
            assert (await http.get("/else")).status_code == 404

    run(main)


def test_a_text_is_made_once_a_second_whoever_asks() -> None:
    made: list[int] = []

    def count() -> Readings:
        made.append(1)
        return collect()

    async def main(port: MetricsPort) -> None:
        async with httpx.AsyncClient(base_url=f"http://{port.address}", timeout=30) as http:
            texts = [reply.text for reply in await asyncio.gather(*(http.get("/metrics") for _ in range(6)))]
        assert len(made) == len({*texts})
        assert len(made) < 6

    run(main, count)


def test_a_port_that_is_taken_is_told_and_the_service_goes_on() -> None:
    with socket.socket() as other, capture_logs() as lines:
        other.bind(("127.0.0.1", 0))
        other.listen(1)

        async def main() -> None:
            with MetricsPort("127.0.0.1", other.getsockname()[1], collect) as port:
                assert port.address == ""

        asyncio.run(main())
    assert [line["event"] for line in lines] == [log.METRICS_UNSERVED]


@pytest.mark.slow
def test_who_connects_and_never_reads_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop turns, somebody else is answered, and one more than may be there is closed."""
    monkeypatch.setattr(port_room, "KEPT_S", 0.0)
    wide = gauge("t_wide", "Text of megabytes, which no buffer of a socket holds.", "number")

    def large() -> Readings:
        readings = collect()
        readings.add_each(wide, {f"{number:0>512}": 1.0 for number in range(10_000)})
        return readings

    with ExitStack() as opened:

        async def main(port: MetricsPort) -> None:
            host, _, number = port.address.rpartition(":")

            def connected() -> socket.socket:
                return opened.enter_context(socket.create_connection((host, int(number))))

            stuck = [connected() for _ in range(MAX_CONNECTIONS - 1)]
            for each in stuck[:2]:
                each.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")  # and never reads
            async with httpx.AsyncClient(base_url=f"http://{port.address}", timeout=60) as http:
                for _ in range(20):  # one after the other, in the last place
                    assert (await http.get("/health")).status_code == 200
                assert "t_wide" in (await http.get("/metrics")).text
            connected()
            beyond = connected()
            beyond.setblocking(False)
            async with asyncio.timeout(60):
                assert await asyncio.get_running_loop().sock_recv(beyond, 1) == b""

        run(main, large)


def test_a_loop_that_stands_is_said_to_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(port_room, "ANSWER_S", 0.05)

    async def main(port: MetricsPort) -> None:
        def ask() -> httpx.Response:
            return httpx.get(f"http://{port.address}/metrics", timeout=60)

        with ThreadPoolExecutor(1) as asking:
            said = asking.submit(ask).result()  # the loop itself waits: nobody is there to copy numbers
        assert said.status_code == 503 and "has not answered" in said.text

    run(main)


def test_port_0_is_none() -> None:
    async def main() -> None:
        with MetricsPort("127.0.0.1", 0, collect) as port:
            assert port.address == ""

    asyncio.run(main())
