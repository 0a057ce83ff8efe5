"""Memory of every process of a mesh under a steady load: how fast it still rises after a while.

    python tests/support/process/soak.py --seconds 1200 --rate 12

Two engines, two routers, index and gateway; prompts of many lengths under every strategy by turns. Nothing is
killed, so what rises is what requests leave behind.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
from pathlib import Path

import numpy as np
import psutil

from microserve.protocol.bus.transport import ZmqBus
from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.services.router.strategies import BUILT_IN
from tests.support.bus.gateway_peer import BusClient
from tests.support.engine.model.tiny_model import make_tiny_model
from tests.support.process.processes import MeshProcesses

SAMPLE_S = 15.0
PROMPTS, OUTPUTS = (20, 60, 200, 400), (4, 16, 40)

Samples = dict[str, list[tuple[float, float]]]
"""By process: seconds since the start, and MiB that are resident."""


async def _serve(mesh: MeshProcesses, seconds: float, rate: float) -> tuple[Samples, int, int]:
    """Samples, requests, and how many of them failed."""
    loop, rng, bus = asyncio.get_running_loop(), random.Random(1), ZmqBus(linger_s=0.1)
    processes = {name: psutil.Process(service.process.pid) for name, service in mesh.services.items()}
    samples: Samples = {name: [] for name in processes}
    reasons: list[str] = []
    first, second = mesh.router_addresses.values()

    async def ask(client: BusClient, strategy: str) -> None:
        prompt = [rng.randrange(20, 250) for _ in range(rng.choice(PROMPTS))]
        params = SamplingParams(max_tokens=rng.choice(OUTPUTS), temperature=0.0, ignore_eos=True)
        reasons.append((await client.generate(prompt, params, strategy=strategy, ttl_s=60.0)).reason)

    try:
        async with BusClient(bus, first) as one, BusClient(bus, second) as other:
            for client in (one, other):
                await client.wait_engines(2)
            began, sampled_at = loop.time(), -SAMPLE_S
            async with asyncio.TaskGroup() as tasks:
                for number in range(round(seconds * rate)):
                    await asyncio.sleep(max(0.0, began + number / rate - loop.time()))
                    tasks.create_task(ask((one, other)[number % 2], BUILT_IN[number % len(BUILT_IN)].name))
                    at = loop.time() - began
                    if at - sampled_at >= SAMPLE_S:
                        sampled_at = at
                        for name, process in processes.items():
                            samples[name].append((at, process.memory_info().rss / 2**20))
    finally:
        bus.close()
    return samples, len(reasons), sum(reason != "length" for reason in reasons)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1200.0)
    parser.add_argument("--rate", type=float, default=12.0, help="requests a second")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        model = make_tiny_model(Path(directory) / "tiny")
        with MeshProcesses(model, Path(directory), num_routers=2, gateway=True) as mesh:
            samples, num_requests, num_failed = asyncio.run(_serve(mesh, arguments.seconds, arguments.rate))
    print(f"{num_requests} requests, {num_failed} failed; resident memory in the second half:")
    for name, found in samples.items():
        times, sizes = np.array([each for each in found if each[0] >= arguments.seconds / 2]).T
        slope = np.polyfit(times / 60, sizes, 1)[0] if len(times) > 1 else float("nan")
        print(f"  {name:<10}{sizes[0]:8.1f} -> {sizes[-1]:.1f} MiB, {slope:+.2f} MiB a minute")
    return 1 if num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
