"""The router's own replica of who holds which prefix, fed by every engine's events.

A lookup costs no round trip and needs no index service. Owns the replica and its feeds; what it says is a
hint, the engine decides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import structlog

from microserve.kvcache.prefix.extension import extension
from microserve.kvcache.prefix.index import PrefixIndex
from microserve.protocol import log
from microserve.protocol.bus.transport import Bus
from microserve.services.links.engine import EngineConnection
from microserve.services.links.feed import Feed
from microserve.services.links.follow import feed_of

Lookup = Callable[[Sequence[int], str, str], dict[str, int]]
"""Tokens, salt and adapter -> tokens of them that an engine holds from the start, by its id."""

_logger = structlog.get_logger()


class PrefixReplica:
    """One prefix index over the engines that are connected."""

    def __init__(self, bus: Bus, *, max_nbytes: int) -> None:
        extension()  # built now if ever, and not when the first engine has come
        self._bus = bus
        self._max_nbytes = max_nbytes
        self._index: PrefixIndex | None = None
        self._feeds: dict[str, tuple[EngineConnection, Feed]] = {}

    @property
    def index(self) -> PrefixIndex | None:
        """None until the first engine is known."""
        return self._index

    def feeds(self) -> list[tuple[str, Feed]]:
        """By engine id."""
        return [(engine_id, feed) for engine_id, (_, feed) in self._feeds.items()]

    def joined(self, connection: EngineConnection) -> None:
        """Follow the engine's events. One whose events cannot be followed is served without."""
        info = connection.info
        index = self._index
        what = (info.block_size, info.model, info.revision)
        if index is not None and (index.block_size, index.model, index.revision) != what:
            others = [c for c, _ in self._feeds.values() if c.engine_id != info.engine_id]
            is_older = not info.revision and any(info.is_stranger(c.info) for c in others)
            if not info.exchanges_kv or is_older:
                return  # its blocks have another size, or other names, than those of the mesh
            index = None
            for other in others:
                if not other.info.exchanges_kv or info.is_stranger(other.info):
                    self.ended(other)
        if index is None:
            index = self._index = PrefixIndex(
                info.block_size, info.model, self._max_nbytes, revision=info.revision
            )
        if info.engine_id in self._feeds:
            self.ended(self._feeds[info.engine_id][0])
        feed = feed_of(self._bus, info, index, connection.snapshot)
        self._feeds[info.engine_id] = (connection, feed)
        try:
            feed.start()
        except Exception:
            # The engine named the address: whatever the socket makes of it must not stop the router.
            _logger.exception(log.BUS_HANDLER_FAILED, engine_id=info.engine_id, address=info.events_address)

    def ended(self, connection: EngineConnection) -> None:
        """Forget what the engine held. Unknown ones are fine."""
        present = self._feeds.get(connection.engine_id)
        if present is None or present[0] is not connection:
            return
        present[1].close()
        del self._feeds[connection.engine_id]
        if self._index is not None:
            self._index.remove_engine(connection.engine_id)

    def lookup(self, tokens: Sequence[int], salt: str, adapter: str = "") -> dict[str, int]:
        """Engine id -> prompt tokens that it holds from the start; at most ``num_block_tokens``."""
        if self._index is None:
            return {}
        return self._index.lookup(tokens, salt, adapter=adapter)

    def close(self) -> None:
        for connection, _ in list(self._feeds.values()):
            self.ended(connection)
