"""What handles and scopes use of an engine's connection: a real one (links/engine.py), or a shadow's.

Owns the list of what a handle, a scope or a view may touch; everything else of a connection belongs to the
registry. Must not know who implements it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from typing import Protocol, TypeVar

from microserve.protocol.errors import EngineLost, MeshError
from microserve.protocol.messages import engine as wire
from microserve.services.links.engine import Answer
from microserve.services.links.stream import TokenStreams

T = TypeVar("T")
Action = wire.PrepRecv | wire.RemoteSend | wire.StartGenerate | wire.Commit | wire.Release
"""What a request asks of an engine; an abort has no answer that anybody waits for."""


class Connection(Protocol):
    """Errors are those of :class:`EngineConnection`'s methods."""

    engine_id: str
    prompts: set[str]
    """Requests that use this engine."""
    streams: TokenStreams

    @property
    def info(self) -> wire.EngineInfo: ...

    @property
    def labels(self) -> Sequence[str]:
        """The operator's, else those that it announces."""

    @property
    def barred(self) -> Collection[str]:
        """Engines to which it may send no KV (suspects.py)."""

    @property
    def load(self) -> wire.EngineLoad:
        """As of the last heartbeat."""

    @property
    def load_at(self) -> float:
        """When that came, by the loop's clock."""

    def begin(
        self, build: Callable[[int], Action], /, *bulk: bytes
    ) -> tuple[int, asyncio.Future[Answer]]: ...

    async def wait(self, call_id: int, future: asyncio.Future[Answer], timeout_s: float, /) -> Answer: ...

    async def call(
        self, build: Callable[[int], Action], expected: type[T], /, *bulk: bytes, timeout_s: float
    ) -> T: ...

    def expect(self, reply: wire.EngineReply, expected: type[T], /) -> T: ...

    def fail(self, call_id: int, error: MeshError, /) -> None: ...

    def abort(self, request_id: str, /) -> None: ...


class EngineLeaving(EngineLost):
    """What an engine generates is to go on elsewhere, because it drains or a strategy wants it so: ends a
    stream on it after the tokens that are in. Not sent."""

    def __init__(self, source: Connection, wanted: str = "") -> None:
        """``wanted``: where it is to go on; empty: anywhere."""
        where = f"moves from engine {source.engine_id} to {wanted}"
        super().__init__(where if wanted else f"engine {source.engine_id} leaves the mesh")
        self.source = source
        self.wanted = wanted
