"""Strategies swapped on a live mesh of real processes under a steady load: nobody may notice.

    python tests/support/router/swaps.py --seconds 60 --swaps 1000 --rate 50

Requests come at a fixed rate to two routers by turns, whatever has been answered; changes come at a fixed
rate too, each a source of its own. Between index and routers a proxy doubles and reorders the control states.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from microserve.protocol import log
from microserve.protocol.bus.transport import ZmqBus
from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.services.command.shared.control_client import ControlClient
from tests.support.bus.gateway_peer import Answer, BusClient
from tests.support.process.control_proxy import ControlProxy
from tests.support.process.processes import MeshProcesses, free_port

GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
HEAD = (
    "from microserve.services.router.authoring import strategy\n\n@strategy\nasync def mine(mesh, request):\n"
)
PLAIN = """    async for tokens in mesh.pick(None, request).start_generate(request):
        yield tokens
"""
SPLIT = """    decode, prefill = mesh.pick(None, request), mesh.pick(None, request)
    grant = await decode.prep_recv(request, end=-1)
    sending = prefill.remote_send(request, grant, end=-1)
    async for tokens in decode.start_generate(request, begin=-1, after=sending):
        yield tokens
"""
LOOK_S = 0.003


def source(number: int) -> str:
    """Another one each time, of two kinds."""
    return f"# {number}\n{HEAD}{(PLAIN, SPLIT)[number % 2]}"


def prompt(number: int) -> list[int]:
    rng = random.Random(number)
    return [rng.randrange(20, 250) for _ in range(40 + 8 * number)]


PROMPTS = [prompt(number) for number in range(6)]


@dataclass
class Swapped:
    """What came of a run."""

    num_swaps: int = 0
    num_requests: int = 0
    wrong: list[str] = field(default_factory=list)
    """Failed, wrong, or served by a version that was not in force; and routers that are not up to date."""
    acknowledged_s: list[float] = field(default_factory=list)
    """From each change's sending until every router had said that it has it, or a later one; sorted."""
    num_versions: int = 0
    """That served at least one request."""
    num_doubled: int = 0
    num_late: int = 0

    def __str__(self) -> str:
        times = [1e3 * seconds for seconds in self.acknowledged_s]
        p50, p99 = times[len(times) // 2], times[int(len(times) * 0.99)]
        return (
            f"{self.num_swaps} swaps, {self.num_requests} requests by {self.num_versions} versions, "
            f"{len(self.wrong)} wrong; {self.num_doubled} control states doubled, {self.num_late} late; "
            f"publish to all acknowledged: p50 {p50:.1f} ms, p99 {p99:.1f} ms"
        )


class _Run:
    def __init__(
        self, control: ControlClient, clients: Sequence[BusClient], expected: list[list[int]]
    ) -> None:
        self.result = Swapped()
        self._control = control
        self._clients = clients
        self._expected = expected
        self._loop = asyncio.get_running_loop()
        self._sent_at: dict[int, float] = {}
        """By version: those that not everybody has."""
        self._highest = self._acknowledged = 0
        self._served: set[int] = set()

    async def go(self, seconds: float, num_swaps: int, rate: float) -> None:
        await self._change(0)
        watching = asyncio.create_task(self._watch())
        while self._sent_at:
            await asyncio.sleep(LOOK_S)
        self.result.acknowledged_s.clear()
        async with asyncio.timeout(seconds * 4 + 60), asyncio.TaskGroup() as tasks:
            tasks.create_task(self._load(seconds, rate, tasks))
            tasks.create_task(self._swap(seconds, num_swaps))
        async with asyncio.timeout(30):
            while self._sent_at:
                await asyncio.sleep(LOOK_S)
        watching.cancel()
        report = await self._control.report()
        late = [r.router_id for r in report.routers if r.version != self._highest]
        if late or report.state.version != self._highest:
            self.result.wrong.append(f"not on version {self._highest}: {late}")
        self.result.acknowledged_s.sort()
        self.result.num_versions = len(self._served)

    async def _swap(self, seconds: float, num_swaps: int) -> None:
        began = self._loop.time()
        for number in range(num_swaps):
            await asyncio.sleep(max(0.0, began + number * seconds / num_swaps - self._loop.time()))
            await self._change(number + 1)
            self.result.num_swaps += 1

    async def _change(self, number: int) -> None:
        sent_at = self._loop.time()
        version = await self._control.change("publish", "mine", source=source(number))
        self._sent_at[version] = sent_at
        self._highest = max(self._highest, version)

    async def _watch(self) -> None:
        while True:
            report = await self._control.report()
            if report.routers:
                self._acknowledged = min(router.version for router in report.routers)
            for version in [v for v in self._sent_at if v <= self._acknowledged]:
                self.result.acknowledged_s.append(self._loop.time() - self._sent_at.pop(version))
            self.result.wrong += [f"{r.router_id}: {fault}" for r in report.routers for fault in r.faults]
            await asyncio.sleep(LOOK_S)

    async def _load(self, seconds: float, rate: float, tasks: asyncio.TaskGroup) -> None:
        began, num = self._loop.time(), round(seconds * rate)
        for number in range(num):
            await asyncio.sleep(max(0.0, began + number / rate - self._loop.time()))
            tasks.create_task(self._ask(number))

    async def _ask(self, number: int) -> None:
        client, which, known = self._clients[number % 2], number % len(PROMPTS), self._acknowledged
        answer = await client.generate(PROMPTS[which], GREEDY, strategy="mine", ttl_s=60.0)
        self.result.num_requests += 1
        self.result.wrong += self._judge(answer, which, known)

    def _judge(self, answer: Answer, which: int, known: int) -> list[str]:
        ended = answer.ended
        if ended is None or answer.reason != "length":
            return [f"{answer.request_id} ended {ended}"]
        self._served.add(ended.strategy_version)
        if answer.token_ids != self._expected[which]:
            return [f"{answer.request_id}: wrong tokens by version {ended.strategy_version}"]
        if not known <= ended.strategy_version <= self._highest + 1:
            return [f"{answer.request_id}: version {ended.strategy_version} of {known} to {self._highest}"]
        return []


async def _swap_on(
    mesh: MeshProcesses,
    index_address: str,
    proxy: ControlProxy,
    bus: ZmqBus,
    counts: tuple[float, int, float],
) -> Swapped:
    control = ControlClient(bus, index_address)
    first, second = mesh.router_addresses.values()
    try:
        async with BusClient(bus, first) as one, BusClient(bus, second) as other:
            for client in (one, other):
                await client.wait_engines(2)
            expected = [
                (await one.generate(tokens, GREEDY, strategy="data_parallel")).token_ids for tokens in PROMPTS
            ]
            run = _Run(control, (one, other), expected)
            await run.go(*counts)
            run.result.num_doubled, run.result.num_late = proxy.num_doubled, proxy.num_late
            return run.result
    finally:
        control.close()


async def _main(model: Path, directory: Path, seconds: float, num_swaps: int, rate: float) -> Swapped:
    bus = ZmqBus(linger_s=0.1)
    port = free_port()
    index_address = f"tcp://127.0.0.1:{port}"
    proxy = ControlProxy(bus, index_address, seed=1)
    mesh = MeshProcesses(
        model,
        directory,
        num_routers=2,
        settings=[f"index.control_path={directory / 'control.db'}"],
        router_index=proxy.address,
    )
    mesh.index_address = index_address
    loop = asyncio.get_running_loop()
    try:
        # Routers reach the index through the proxy, which is served by this very loop.
        await loop.run_in_executor(None, mesh.__enter__)
        try:
            result = await _swap_on(mesh, index_address, proxy, bus, (seconds, num_swaps, rate))
            for name in mesh.router_addresses:  # nothing was saved by the fallback either
                failed = [e for e in mesh.events(name) if e["event"] == log.STRATEGY_FAILED]
                result.wrong += [f"{name}: {event}" for event in failed]
            return result
        finally:
            await loop.run_in_executor(None, mesh.__exit__)
    finally:
        proxy.close()
        bus.close()


def run_swaps(model: Path, directory: Path, *, seconds: float, num_swaps: int, rate: float) -> Swapped:
    """Start a mesh of two engines and two routers, and swap on it."""
    return asyncio.run(_main(model, directory, seconds, num_swaps, rate))


def main() -> int:
    from tests.support.engine.model.tiny_model import make_tiny_model

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--swaps", type=int, default=1000)
    parser.add_argument("--rate", type=float, default=50.0, help="requests a second")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        model = make_tiny_model(Path(directory) / "tiny")
        result = run_swaps(
            model, Path(directory), seconds=arguments.seconds, num_swaps=arguments.swaps, rate=arguments.rate
        )
    print(result)
    for line in result.wrong[:10]:
        print(f"  {line}")
    return 1 if result.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
