"""A running index service and peers that talk to it, for tests."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from typing import TypeVar

import pytest

from microserve.protocol.bus.codec import INDEX_REPLY, INDEX_REQUEST
from microserve.protocol.messages.index import IndexReply, IndexRequest, Members
from microserve.protocol.process.lifecycle import Lifecycle
from microserve.protocol.settings.sources import load_settings
from microserve.services.index.service import run_index
from tests.support.index.index_world import ANY, World, in_world

T = TypeVar("T", bound=IndexReply)


class Peer:
    """Any service that talks to the index; keeps every answer."""

    def __init__(self, world: World, address: str) -> None:
        self._world = world
        self.replies: list[IndexReply] = []
        self.socket = world.bus.client(
            address, lambda frames: self.replies.append(INDEX_REPLY.decode(frames)[0])
        )

    def send(self, message: IndexRequest, *bulk: bytes) -> None:
        self.socket.send(INDEX_REQUEST.encode(message, *bulk))

    async def ask(self, kind: type[T], message: IndexRequest, *bulk: bytes) -> T:
        """The first answer of that kind to this message."""
        seen = len(self.replies)
        self.send(message, *bulk)
        await self._world.until(lambda: any(isinstance(reply, kind) for reply in self.replies[seen:]))
        return next(reply for reply in self.replies[seen:] if isinstance(reply, kind))

    def latest(self) -> Members:
        return next(reply for reply in reversed(self.replies) if isinstance(reply, Members))

    def sees(self, *engine_ids: str) -> bool:
        known = [reply for reply in self.replies if isinstance(reply, Members)]
        return bool(known) and {m.info.engine_id for m in known[-1].members} == set(engine_ids)


class Index:
    """A running index service."""

    def __init__(
        self,
        world: World,
        address: str = ANY,
        *,
        interval_s: float = 0.05,
        liveness: int = 100,
        foreign: Sequence[str] = (),
    ) -> None:
        settings = load_settings(
            overrides=[
                f"index.foreign={json.dumps([*foreign])}",
                f"index.address={address}",
                f"bus.heartbeat_interval_s={interval_s}",
                f"bus.liveness={liveness}",
                "index.max_mb=2",
            ]
        )
        self._world = world
        self.lifecycle = Lifecycle()
        self.task = asyncio.ensure_future(run_index(settings, world.bus, self.lifecycle))
        self.address = ""

    async def ready(self) -> Index:
        self.address = await self.lifecycle.wait_ready()
        return self

    def peer(self) -> Peer:
        return Peer(self._world, self.address)

    async def stop(self) -> None:
        self.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await self.task


def with_index(
    test: Callable[[World, Index], object], *, interval_s: float = 0.05, liveness: int = 100
) -> None:
    async def run(world: World) -> None:
        index = await Index(world, interval_s=interval_s, liveness=liveness).ready()
        try:
            await test(world, index)  # type: ignore[misc]
        finally:
            await index.stop()

    in_world(run)
