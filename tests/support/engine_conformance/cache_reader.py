"""An engine's prefix cache as a reader of its KV events sees it (WIRE.md 7): snapshot, then batches in order.

Written from the document, not from the readers of ours: what it predicts is compared with what the engine
grants. Owns the subscription and the book of blocks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from microserve.protocol.bus.transport import Bus
from microserve.protocol.messages.kv.kv_decoding import decode_batch
from microserve.protocol.messages.kv.kv_events import (
    BlockRemoved,
    BlockStored,
    KVEvent,
    Published,
    parse_published,
)
from tests.support.engine_conformance.wire_client import WireClient

Hash = int | bytes
Content = tuple[Hash | None, tuple[int, ...], tuple[object, ...]]
"""Of a block: its parent, its tokens, and what else its name depends on."""


class Book:
    """Blocks by name."""

    def __init__(self, block_size: int, events: Iterable[KVEvent] = ()) -> None:
        self.blocks: dict[Hash, Content] = {}
        self._block_size = block_size
        for event in events:
            assert isinstance(event, BlockStored), "a snapshot says what is there"
            parent = event.parent_block_hash
            assert parent is None or parent in self.blocks, "a child before its parent"
            self.apply(event)

    def apply(self, event: KVEvent) -> None:
        match event:
            case BlockStored():
                names, parent = event.block_hashes, event.parent_block_hash
                assert event.block_size == self._block_size
                assert len(event.token_ids) == self._block_size * len(names)
                for number, name in enumerate(names):
                    tokens = event.token_ids[number * self._block_size :][: self._block_size]
                    extra = (event.extra_keys or [None] * len(names))[number] or ()
                    self.blocks[name] = (parent, tuple(tokens), tuple(extra))
                    parent = name
            case BlockRemoved():
                for name in event.block_hashes:
                    assert self.blocks.pop(name, None) is not None, "a block that is not held is removed"
            case _:
                self.blocks.clear()

    def matched(self, tokens: list[int], salt: str = "") -> int:
        """Tokens of the longest prefix of whole blocks that the cache holds."""
        names = {content: name for name, content in self.blocks.items()}
        parent: Hash | None = None
        num_matched = 0
        for start in range(0, len(tokens) - self._block_size + 1, self._block_size):
            extra = (salt,) if salt and start == 0 else ()
            content = (parent, tuple(tokens[start : start + self._block_size]), extra)
            if content not in names:
                break
            parent = names[content]
            num_matched += self._block_size
        return num_matched


class CacheReader:
    """``start`` it before the events that matter; ``book`` is as of the last ``catch_up``."""

    def __init__(self, bus: Bus, client: WireClient) -> None:
        self._client = client
        self._info = client.info
        self._came: list[Published] = []
        self._next = 0
        self.book = Book(client.info.block_size)
        self.num_events: Counter[str] = Counter()
        self.subscription = bus.subscriber(
            client.info.events_address, self._take, server_key=client.info.events_key
        )

    def _take(self, frames: list[bytes]) -> None:
        self._came.append(parse_published(frames))
        self._client.stir()

    async def start(self) -> None:
        """Live: something has come of the stream, and the snapshot is in."""
        await self._client.until(lambda: bool(self._came))
        self._next, self.book = await self.snapshot()
        self._came = [each for each in self._came if each.seq >= self._next]

    async def snapshot(self) -> tuple[int, Book]:
        """The first batch that is not in it, and what the cache holds."""
        reply, payload = await self._client.snapshot()
        assert reply.epoch == self._info.incarnation
        batch = decode_batch(payload)
        assert batch.epoch in (None, reply.epoch)
        return reply.seq, Book(self._info.block_size, batch.events)

    async def catch_up(self) -> Book:
        """Apply all that has been published, in order and without a gap; it must come to what a snapshot
        says."""
        until, snapshot = await self.snapshot()
        await self._client.until(lambda: self._advance(until))
        assert self.book.blocks == snapshot.blocks, "events and snapshot tell of two caches"
        return self.book

    def _advance(self, until: int) -> bool:
        while self._came and self._next < until:
            published = self._came.pop(0)
            assert published.topic == f"kv@{self._info.engine_id}@{self._info.model}"
            if published.seq < self._next:  # a heartbeat: the last batch once more
                continue
            assert published.seq == self._next, f"batch {published.seq} came, {self._next} was next"
            batch = decode_batch(published.payload)
            assert batch.epoch == self._info.incarnation
            for event in batch.events:
                self.num_events[type(event).__name__] += 1
                self.book.apply(event)
            self._next += 1
        return self._next == until
