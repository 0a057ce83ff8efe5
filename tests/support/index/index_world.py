"""An engine as the index sees it: real sockets, publisher and prefix cache, and no model behind them."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from microserve.kvcache.block_pool import BlockPool
from microserve.kvcache.prefix.cache import PrefixCache
from microserve.protocol.bus.codec import ENGINE_REPLY, ENGINE_REQUEST
from microserve.protocol.bus.numbered import NumberedServer
from microserve.protocol.bus.transport import Bus, ClientSocket, FramesHandler, ZmqBus
from microserve.protocol.messages.engine import (
    EngineInfo,
    EngineLoad,
    EngineReply,
    Failed,
    Hello,
    Ping,
    Snapshot,
    SnapshotReply,
    Welcome,
)
from microserve.protocol.messages.kv.kv_events import KVEventBatch, encode_batch
from microserve.protocol.types import WIRE_VERSION
from microserve.services.engine.shell.kv_publisher import KvPublisher

ANY = "tcp://127.0.0.1:0"
BLOCK_SIZE = 4


def make_info(engine_id: str = "e1", incarnation: int = 11, **changes: Any) -> EngineInfo:
    info = EngineInfo(
        engine_id=engine_id,
        incarnation=incarnation,
        address="tcp://127.0.0.1:1",
        events_address="tcp://127.0.0.1:2",
        replay_address="tcp://127.0.0.1:3",
        model="m",
        labels=[],
        block_size=BLOCK_SIZE,
        num_blocks=64,
        num_layers=2,
        max_model_len=256,
        vocab_size=1000,
        eos_token_ids=[2],
        layout_hash="layout",
        heap="shm",
        wire_version=WIRE_VERSION,
    )
    return msgspec.structs.replace(info, **changes)


class Engine:
    """One life of one engine: answers ``Hello`` and ``Snapshot``, publishes what its cache holds."""

    def __init__(
        self,
        bus: Bus,
        engine_id: str = "e1",
        incarnation: int = 11,
        *,
        model: str = "m",
        address: str = ANY,
        events_address: str = ANY,
        topic: str | None = None,
        strict: bool = False,
        **changes: Any,
    ) -> None:
        self.num_snapshots = 0
        self.pings: list[int] = []
        self.refuse_snapshots = False
        self.load = EngineLoad()
        self._incarnation, self._strict = incarnation, strict
        self._known: set[bytes] = set()
        self._pool = BlockPool(64)
        self._cache = PrefixCache(self._pool, BLOCK_SIZE, model)
        self.publisher = KvPublisher(
            bus,
            events_address=events_address,
            replay_address=ANY,
            topic=f"kv@{engine_id}@{model}" if topic is None else topic,
            epoch=incarnation,
            clock=lambda: 0.0,
            strict=strict,
        )
        self._socket = NumberedServer(bus, address, self._on_frames, lambda peer: None)
        self.info = make_info(
            engine_id,
            incarnation,
            model=model,
            address=self._socket.address,
            events_address=self.publisher.address,
            replay_address=self.publisher.replay_address,
            **changes,
        )

    def compute(self, tokens: list[int], salt: str = "") -> None:
        """Hold the KV of ``tokens`` and say so."""
        num_blocks = len(tokens) // BLOCK_SIZE
        blocks = self._pool.allocate(num_blocks)
        self._cache.insert(tokens, blocks, num_blocks, salt)
        self._pool.free(blocks)
        self.publisher.publish(self._cache.take_events())

    def clear(self) -> None:
        self._cache.clear()
        self.publisher.publish(self._cache.take_events())

    def snapshot_events(self) -> bytes:
        batch = KVEventBatch(0.0, [*self._cache.snapshot()], None, self._incarnation)
        return encode_batch(batch, strict=self._strict)

    def forget_peers(self) -> None:
        self._known.clear()

    def close(self) -> None:
        self.publisher.close()
        self._socket.close()

    def _on_frames(self, peer: bytes, frames: list[bytes]) -> None:
        message, _ = ENGINE_REQUEST.decode(frames)
        match message:
            case Hello(call_id):
                self._known.add(peer)
                self._answer(peer, Welcome(call_id, self.info, self.load))
            case Snapshot(call_id) if self.refuse_snapshots or peer not in self._known:
                self._answer(peer, Failed(call_id, "draining", "not now"))
            case Snapshot(call_id):
                self.num_snapshots += 1
                reply = SnapshotReply(call_id, self._incarnation, self.publisher.next_seq)
                self._answer(peer, reply, self.snapshot_events())
            case Ping(incarnation):
                self.pings.append(incarnation)
            case _:
                raise AssertionError(f"the index sent {message}")

    def _answer(self, peer: bytes, reply: EngineReply, *bulk: bytes) -> None:
        self._socket.send(peer, ENGINE_REPLY.encode(reply, *bulk))


class LossyBus(ZmqBus):
    """Loses published batches while ``lose`` says so."""

    def __init__(self) -> None:
        super().__init__()
        self.lose: Callable[[list[bytes]], bool] = lambda frames: False
        self.num_lost = 0

    def subscriber(self, address: str, handler: FramesHandler, *, server_key: str = "") -> ClientSocket:
        def lossy(frames: list[bytes]) -> None:
            if self.lose(frames):
                self.num_lost += 1
            else:
                handler(frames)

        return super().subscriber(address, lossy, server_key=server_key)


async def until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    """Let the loop run until the condition holds."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.002)


class World:
    """What a test needs: a bus, engines on it, and a way to wait."""

    def __init__(self) -> None:
        self.bus = LossyBus()
        self.until = until
        self._directory = tempfile.TemporaryDirectory(prefix="mesh")
        self._closers: list[Callable[[], object]] = []

    def engine(
        self,
        engine_id: str = "e1",
        incarnation: int = 11,
        *,
        model: str = "m",
        address: str = ANY,
        events_address: str = ANY,
        topic: str | None = None,
        strict: bool = False,
        **changes: Any,
    ) -> Engine:
        """``changes``: fields of its ``EngineInfo``."""
        engine = Engine(
            self.bus,
            engine_id,
            incarnation,
            model=model,
            address=address,
            events_address=events_address,
            topic=topic,
            strict=strict,
            **changes,
        )
        self._closers.append(engine.close)
        return engine

    def place(self) -> str:
        """An address to be bound more than once: a TCP port may be somebody else's the next time."""
        return f"ipc://{self._directory.name}/place"

    def at_end(self, close: Callable[[], object]) -> None:
        self._closers.append(close)

    def close(self) -> None:
        for close in reversed(self._closers):
            close()
        self.bus.close()
        self._directory.cleanup()


def in_world(test: Callable[[World], Awaitable[None]]) -> None:
    """Run a coroutine function with a fresh world; everything is closed afterwards."""

    async def run() -> None:
        world = World()
        try:
            await test(world)
        finally:
            world.close()

    asyncio.run(run())
