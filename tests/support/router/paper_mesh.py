"""A mesh on paper: the real ``Mesh``, book and links over engines that are only numbers.

For decisions alone, by the thousand: whatever would be sent has nowhere to go.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import msgspec

from microserve.protocol.messages.engine import EngineInfo, EngineLoad, Sent, Timings
from microserve.protocol.messages.kv.geometry import UNSAID
from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.services.router.authoring.mesh import Mesh
from microserve.services.router.authoring.view import StrategyState
from microserve.services.router.engines.connection import Connection
from microserve.services.router.engines.load import LoadBook
from microserve.services.router.request.phase import PhaseClock
from microserve.services.router.request.request import Request
from microserve.services.router.request.scope import RequestScope
from tests.support.bus.wire_parts import INFO

BLOCK_SIZE = 16


@dataclass
class PaperEngine:
    """What a mesh reads of an engine's connection."""

    engine_id: str
    load: EngineLoad = field(default_factory=EngineLoad)
    labels: list[str] = field(default_factory=list)
    num_blocks: int = 1000
    load_at: float = 0.0
    barred: tuple[str, ...] = ()
    said: dict[str, Any] = field(default_factory=dict)
    """Of its ``EngineInfo``, what is not as of an engine that says nothing."""

    @property
    def info(self) -> EngineInfo:
        return msgspec.structs.replace(
            INFO,
            engine_id=self.engine_id,
            labels=self.labels,
            num_blocks=self.num_blocks,
            block_size=BLOCK_SIZE,
            **{"can": None, "geometry": UNSAID, "split_tokens": 1, "recompute_tokens": 0, **self.said},
        )


@contextmanager
def paper_mesh(
    *engines: PaperEngine,
    num_tokens: int = 100,
    held: Mapping[str, int] | None = None,
    book: LoadBook | None = None,
    seed: int = 0,
) -> Iterator[tuple[Mesh, Request]]:
    """A mesh for one request of ``num_tokens``; ``held`` is what the prefix replica says of it."""

    async def make() -> RequestScope:
        now = asyncio.get_running_loop().time()
        for engine in engines:
            engine.load_at = now
        request = Request("r", range(num_tokens), SamplingParams(max_tokens=4), now + 60.0, BLOCK_SIZE)
        return RequestScope(request, used.open(), PhaseClock(now), call_timeout_s=1.0)

    used = book or LoadBook()
    connections = cast("list[Connection]", list(engines))
    with asyncio.Runner() as runner:
        scope = runner.run(make())
        rng, state = random.Random(seed), StrategyState()
        mesh = Mesh(
            scope, lambda: connections, used, lambda _tokens, _salt, _adapter: dict(held or {}), rng, state
        )
        yield mesh, scope.request
        scope.close()


def sent(num_tokens: int, *, nbytes: int, transfer_s: float) -> Sent:
    """A sender's report."""
    return Sent(1, "r", num_tokens, 0, num_tokens, nbytes, Timings(transfer_s=transfer_s))


def by_id(mesh: Mesh) -> dict[str, Any]:
    return {engine.id: engine for engine in mesh.engines()}
