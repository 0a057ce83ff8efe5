"""What *free* and *quarantine* mean for blocks that are vLLM's: the end of a parked request, now or later.

The table of grants (kvcache/grant) frees a grant's blocks when no writer can reach them any more. Here they
are a parked request's, all at once: giving them back is a word to the connector, which reports the request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from microserve.protocol.errors import InternalError

PINNED = -1
"""Stands for a block that vLLM matched: pinned by the parked request, and of no concern to writers."""


class ReceivePool:
    """Blocks that are granted, by the receive whose they are."""

    def __init__(self, give_back: Callable[[int], None]) -> None:
        """``give_back``: called with the id of a receive when no write into its blocks can come any more."""
        self._give_back = give_back
        self._owners: dict[int, int] = {}
        self._quarantined: set[int] = set()

    @property
    def num_quarantined(self) -> int:
        return len(self._quarantined)

    def own(self, blocks: Iterable[int], receive: int) -> None:
        """Before they are granted."""
        for block in blocks:
            if self._owners.setdefault(block, receive) != receive:
                raise InternalError(f"block {block} of receive {receive} is granted to {self._owners[block]}")

    def disown(self, blocks: Iterable[int]) -> None:
        """They are vLLM's, by our word or as they were."""
        for block in blocks:
            del self._owners[block]

    def free(self, blocks: Sequence[int]) -> None:
        granted = [block for block in blocks if block != PINNED]
        self._end(granted)

    def quarantine(self, blocks: Iterable[int]) -> None:
        self._quarantined.update(blocks)

    def discharge(self, blocks: Iterable[int]) -> None:
        discharged = list(blocks)
        self._quarantined.difference_update(discharged)
        self._end(discharged)

    def ref_count(self, block: int) -> int:
        return int(block in self._owners and block not in self._quarantined)

    def is_cached(self, block: int) -> bool:
        """Never while it is granted: vLLM caches what it has promoted."""
        return False

    def _end(self, blocks: list[int]) -> None:
        if blocks:
            receive = self._owners[blocks[0]]
            self.disown(blocks)
            self._give_back(receive)
