"""What a router's decision takes, with the record of why and without: no sockets, no engines.

    python benchmarks/mesh/picks.py [--rounds 15] [--requests 400] [--heartbeats 8] [--json]

A request here is two picks (``decode``, and ``prefill`` of the others) with all that is made for them: scope,
account, mesh, and at the end its line's words and its record. Both sides take turns; CPU microseconds a
request, medians over the rounds, among 2, 8 and 32 engines. A heartbeat of one engine comes every so many
requests.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from dataclasses import dataclass, field
from typing import Any, cast

from microserve.protocol.messages.engine import EngineInfo, EngineLoad
from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.protocol.types import WIRE_VERSION
from microserve.services.router.authoring.mesh import Mesh
from microserve.services.router.authoring.view import StrategyState
from microserve.services.router.engines.connection import Connection
from microserve.services.router.engines.load import LoadBook
from microserve.services.router.request.phase import PhaseClock
from microserve.services.router.request.records import Head, Records
from microserve.services.router.request.request import Request
from microserve.services.router.request.scope import RequestScope
from microserve.services.router.request.trail import Trail

SIZES = (2, 8, 32)
HEAD = Head("auto", 0, True, ["tenant", "priority"], 16, 1000, 100, 256, "length", "")


@dataclass(eq=False)
class Peer:
    """What a pick reads of a connection."""

    engine_id: str
    info: EngineInfo
    load: EngineLoad
    load_at: float = 0.0
    barred: tuple[str, ...] = ()
    prompts: set[str] = field(default_factory=set)

    @property
    def labels(self) -> list[str]:
        return self.info.labels


def peers(count: int) -> list[Peer]:
    made = []
    for number in range(count):
        name = f"engine-{number}"
        info = EngineInfo(
            engine_id=name,
            incarnation=1,
            address="tcp://127.0.0.1:7000",
            events_address="",
            replay_address="",
            model="m",
            labels=[],
            block_size=16,
            num_blocks=4096,
            num_layers=30,
            max_model_len=8192,
            vocab_size=50_000,
            eos_token_ids=[2],
            layout_hash="h",
            heap="shm",
            wire_version=WIRE_VERSION,
        )
        load = EngineLoad(num_running=number % 7, free_blocks=4000 - number, prefill_tokens_per_s=9000.5)
        made.append(Peer(name, info, load))
    return made


class Side:
    def __init__(self, num_engines: int, num_records: int) -> None:
        self.took_us: list[float] = []
        self.records = Records(num_records, 64 << 20)
        self._peers = peers(num_engines)
        self._book = LoadBook()
        self._rng = random.Random(1)
        self._state = StrategyState()

    def beat(self, number: int, now: float) -> None:
        self._peers[number % len(self._peers)].load_at = now

    def serve(self, request: Request, now: float) -> None:
        scope = RequestScope(request, self._book.open(), PhaseClock(now), call_timeout_s=5.0)
        trail: Trail | None = None
        if self.records.is_on:
            trail = Trail("auto", 0, request.num_tokens, scope.decision, now, scope.now, self.records.sights)
            scope.trail = trail
        connections = cast(list[Connection], self._peers)
        mesh = Mesh(scope, lambda: connections, self._book, lambda *_: {}, self._rng, self._state)
        decode = mesh.pick("decode", request)
        mesh.pick("prefill", request, exclude=[decode])
        if trail is not None:
            trail.in_short()
            self.records.add(request.request_id, HEAD, [trail], now)
        scope.close()


async def measure(num_engines: int, options: argparse.Namespace) -> list[Side]:
    sides = [Side(num_engines, 0), Side(num_engines, 10_000)]
    request = Request("r.0a0a0a0a-0", list(range(1000)), SamplingParams(), 1e12, 16)
    for number in range(options.rounds + 1):
        for side in sides if number % 2 else reversed(sides):
            began = time.process_time_ns()
            for each in range(options.requests):
                if each % options.heartbeats == 0:
                    side.beat(each, time.monotonic())
                side.serve(request, time.monotonic())
            side.took_us.append((time.process_time_ns() - began) / options.requests / 1000)
    return sides


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--requests", type=int, default=400, help="In a round of a side.")
    parser.add_argument("--heartbeats", type=int, default=8, help="Requests between two of them.")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    figures: dict[str, Any] = {}
    for num_engines in SIZES:
        without, recorded = asyncio.run(measure(num_engines, options))
        off, on = (statistics.median(side.took_us[1:]) for side in (without, recorded))
        figures[str(num_engines)] = {
            "without_us": round(off, 1),
            "with_us": round(on, 1),
            "record_nbytes": round(recorded.records.nbytes / len(recorded.records)),
        }
    if options.json:
        print(json.dumps(figures))
        return
    print(f"{'engines':>8}{'without, us':>13}{'with, us':>10}{'more, us':>10}{'bytes':>8}")
    for count, found in figures.items():
        more = found["with_us"] - found["without_us"]
        print(
            f"{count:>8}{found['without_us']:>13.1f}{found['with_us']:>10.1f}{more:>10.1f}{found['record_nbytes']:>8}"
        )


if __name__ == "__main__":
    main()
