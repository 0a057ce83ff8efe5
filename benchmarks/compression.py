"""What KV in fewer bytes brings over links of several rates: each way of a library, and the chosen one.

    python benchmarks/compression.py --library FILE [--mbit 10 50 200 1000] [--rounds 5] [--warm 6]
        [--prompt 600] [--tokens 16] [--ways NAME ...] [--exact] [--json FILE] [--plot FILE]

As root: a front and two hosts (namespaces), an engine of the demo model on each, both cables shaped by tbf at
one rate after the other. A plain stream of TCP between them says first what the cable carries: within 3 % of
what was asked for, headers counted, or the run ends. Then one request at a time, of a prompt that nobody has
seen: one engine computes it, its KV goes to the other one, which decodes; its whole time (JCT) is what the
asker sees. Ways take turns, in an order drawn anew each round. ``auto`` learns from ``--warm`` requests.

    none     KV as it is             NAME   one profile of the library
    auto     the sender's controller chooses (with ``--exact``: among those that lose nothing)

Printed are medians by rate, and the ratio of ``auto`` to the best other way, by the medians and round by
round to the way that is best by its median.

Two cores serve both engines, the asker and the network: prompts are computed one at a time, and no rate above
what the cores can encode is reached by any way.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / ".src"))

from microserve.kvcache.codec.library import load
from microserve.protocol import log
from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.services.local.demo.model import default_cache, fetch
from tests.support.bus.gateway_peer import BusClient
from tests.support.hosts.mesh import HostMesh
from tests.support.hosts.world import World

AUTO, NONE = "auto", "none"
TTL_S = 300.0
SELF_TEST_S = 2.0
NUM_SELF_TESTS = 3
TOLERANCE = 0.03
FRAME_NBYTES, PAYLOAD_NBYTES = 1514, 1448
"""Of a full packet at an MTU of 1,500: as tbf counts it, and of TCP's stream in it."""
STRATEGY = """
from microserve.services.router.authoring import Chunks, Mesh, Request, strategy


@strategy
async def coded_{number}(mesh: Mesh, request: Request) -> Chunks:
    \"\"\"Prefill on one engine, decode on another, KV by {codec}.\"\"\"
    decode = mesh.pick("decode", request)
    prefill = mesh.pick("prefill", request, exclude=[decode])
    grant = await decode.prep_recv(request, lossy={lossy})
    sending = prefill.remote_send(request, grant, codec={codec!r})
    yield decode.start_generate(request, begin=grant.end, after=sending)
"""


@dataclass
class Way:
    name: str
    strategy: str
    seen_s: dict[float, list[float]] = field(default_factory=dict)
    """JCT by rate, in the order of the rounds."""


def measured_mbit_s(world: World, seconds: float) -> float:
    """What a plain stream from one host of engines to the other carries, in bits of the cable."""
    source, target = world["e0"], world["e1"]
    sink = (
        "import socket,time\n"
        f"with socket.create_server(('{target.address}', 7001)) as server:\n"
        " print('here', flush=True)\n"
        " connection, _ = server.accept()\n"
        " got, since, counted_from = 0, None, None\n"
        " while data := connection.recv(1 << 16):\n"
        "  now = time.monotonic()\n"
        "  since = since or now\n"
        "  if counted_from: got, last = got + len(data), now\n"
        f"  elif now - since > {seconds / 3}: counted_from = now\n"
        f"  if now - since > {seconds}: break\n"
        " print(got / (last - counted_from))\n"
    )
    child = target.inside.start([sys.executable, "-c", sink], sink=-1)
    assert child.stdout is not None
    child.stdout.readline()
    with source.inside.joined():
        stream = socket.create_connection((target.address, 7001))
    stream.settimeout(10)
    block, until = bytes(1 << 18), time.monotonic() + 2 * seconds
    try:
        while time.monotonic() < until:
            stream.sendall(block)
    except OSError:
        pass  # the other end has seen enough
    stream.close()
    said = child.communicate(timeout=30)[0]
    return float(said) * 8e-6 * FRAME_NBYTES / PAYLOAD_NBYTES


def carried_mbit_s(world: World, mbit: float) -> float:
    """Raises ``RuntimeError`` for another rate than was asked for, three times in a row: a bucket that was
    full at the beginning is no fault."""
    seen: list[float] = []
    while len(seen) < NUM_SELF_TESTS:
        seen.append(measured_mbit_s(world, max(SELF_TEST_S, 60 / mbit)))
        if abs(seen[-1] / mbit - 1) <= TOLERANCE:
            return seen[-1]
    raise RuntimeError(f"a cable of {mbit:g} Mbit/s carries {seen}")


async def ask(client: BusClient, way: Way, prompt: Sequence[int], tokens: int) -> float:
    params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    since = time.monotonic()
    answer = await client.generate(prompt, params, strategy=way.strategy, ttl_s=TTL_S, may_lose=True)
    if answer.reason != "length":
        raise RuntimeError(f"{way.name}: {answer.ended}")
    return time.monotonic() - since


def used(mesh: HostMesh) -> list[str]:
    """Profiles of all sends so far, in their order."""
    events = [each for name in ("engine-0", "engine-1") for each in mesh.events(name)]
    sent = [each for each in events if each["event"] == log.KV_SENT]
    return [str(each.get("codec") or NONE) for each in sorted(sent, key=lambda each: float(str(each["ts"])))]


async def rate(mesh: HostMesh, mbit: float, ways: list[Way], options: argparse.Namespace) -> None:
    chance = random.Random(f"{mbit}")

    def prompt() -> list[int]:
        return [chance.randrange(300, 40_000) for _ in range(options.prompt)]

    auto = next(way for way in ways if way.name == AUTO)
    async with mesh.client() as client:
        for _ in range(options.warm):
            await ask(client, auto, prompt(), options.tokens)
        for _ in range(options.rounds):
            for way in chance.sample(ways, len(ways)):
                way.seen_s.setdefault(mbit, []).append(await ask(client, way, prompt(), options.tokens))


def told(ways: list[Way], mbit: float) -> dict[str, Any]:
    medians = {way.name: statistics.median(way.seen_s[mbit]) for way in ways}
    others = [way for way in ways if way.name != AUTO]
    best = min(others, key=lambda way: medians[way.name])
    auto = next(way for way in ways if way.name == AUTO)
    rounds = [a / b for a, b in zip(auto.seen_s[mbit], best.seen_s[mbit], strict=True)]
    return {
        "mbit_s": mbit,
        "jct_s": {name: round(each, 4) for name, each in medians.items()},
        "best": best.name,
        "auto_to_best": round(medians[AUTO] / medians[best.name], 4),
        "auto_to_best_by_rounds": round(statistics.median(rounds), 4),
        "none_to_auto": round(medians[NONE] / medians[AUTO], 3),
    }


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Each way's median JCT as a share of that of KV as it is, by rate."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from microserve.services.simulation.load.figures.plots import STYLE

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.0, 3.4), layout="constrained")
        panel = figure.subplots()
        rates = [row["mbit_s"] for row in rows]
        for name in rows[0]["jct_s"]:
            shares = [row["jct_s"][name] / row["jct_s"][NONE] for row in rows]
            style = {"color": "black", "linewidth": 2.0} if name == AUTO else {"linewidth": 1.2}
            panel.plot(
                rates, shares, "--" if name == NONE else "-", marker="o", markersize=2.5, label=name, **style
            )
        panel.set_xscale("log")
        panel.set_xticks(rates, [f"{each:g}" for each in rates])
        panel.minorticks_off()
        panel.set_xlabel("Mbit/s of the link")
        panel.set_ylabel("median JCT / that of KV as it is")
        panel.set_ylim(0.0)
        figure.legend(loc="outside right center", frameon=False)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--library", required=True)
    parser.add_argument("--mbit", type=float, nargs="+", default=[10, 50, 200, 1000])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warm", type=int, default=6)
    parser.add_argument("--prompt", type=int, default=600)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--ways", nargs="*", help="profiles; all of the library's if none is named")
    parser.add_argument("--exact", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="an SVG of it")
    options = parser.parse_args()
    library = str(Path(options.library).resolve())
    profiles = options.ways or [each.profile.name for each in load(library).entries]
    names = [NONE, *(each for each in profiles if each != NONE), AUTO]
    ways = [Way(name, f"coded_{number}") for number, name in enumerate(names)]
    model = fetch(default_cache(os.environ))
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="compression-") as home, World(Path(home)) as world:
        (logs := Path(home) / "logs").mkdir()
        (sources := Path(home) / "coded.py").write_text(
            "\n".join(
                STRATEGY.format(
                    number=number,
                    codec="" if name == NONE else name,
                    lossy=not options.exact,
                )
                for number, name in enumerate(names)
            )
        )
        settings = [
            f"engine.codec_library={library}",
            f'router.strategy_files=["{sources}"]',
            "kvcache.num_blocks=600",
            "engine.max_model_len=2048",
            "engine.threads=1",
            "router.call_timeout_s=120",
            "router.check_interval_s=0",
            "kvcache.lease_s=300",
        ]
        with HostMesh(Path(model), logs, world=world, settings=settings) as mesh:
            for mbit in options.mbit:
                for host in mesh.engine_hosts:
                    world.slow(host, mbit)
                carried = carried_mbit_s(world, mbit)
                before = len(used(mesh))
                asyncio.run(rate(mesh, mbit, ways, options))
                row = told(ways, mbit) | {"carried_mbit_s": round(carried, 2)}
                rows.append(row)
                print(json.dumps(row), flush=True)
                print("used:", *used(mesh)[before:], flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    if options.plot:
        draw(rows, options.plot)


if __name__ == "__main__":
    main()
