"""Who holds which block: reference counts, the free list, quarantine.

A block is in exactly one of three states:

    free         ref_count 0, linked in the free list; cached or not
    used         ref_count > 0; cached or not
    quarantined  a remote writer may still write into it, so nobody may hold or take it

The free list runs from the next block to take to the last:

    head  uncached, ...   cached: least recently used, ..., most recently used  tail

Blocks that nobody has had yet may still be without memory: they come behind the uncached ones, in order, and
get it when they are wanted. Where there is none left, the pool makes do with those that have theirs.

Owns ids only. Does not know what a block holds (prefix/cache.py) nor where it lies (heap/).
Every operation is O(1) per block. :class:`InternalError` means that a caller broke the rules; the call
stops at the first bad block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from microserve.protocol.errors import CacheFull, ConfigError, InternalError

RETRY_AFTER_S = 0.1
"""Hint in ``CacheFull``: about the time in which some sequence ends on a busy engine."""

_UNLINKED = -1

Back = Callable[[int, int], int]
"""Called with the first block that is without memory, and how many are wanted: gives memory to these or more,
in order, and returns the end of those that have it; nothing more than before: there is none now."""


class BlockPool:
    """Blocks ``0 .. num_blocks - 1``."""

    def __init__(self, num_blocks: int, back: Back | None = None) -> None:
        """``back``: None where all blocks have their memory."""
        if num_blocks < 1:
            raise ConfigError(f"num_blocks is {num_blocks}, at least 1", field="num_blocks")
        self.num_blocks = num_blocks
        self.on_evict: Callable[[int], None] | None = None
        """Called for each cached block that ``allocate`` takes; the block is used and uncached by then."""
        self._ref_counts = [0] * num_blocks
        self._cached = bytearray(num_blocks)
        self._quarantined = bytearray(num_blocks)
        self._num_free = 0
        """In the free list."""
        self._num_free_cached = 0
        self._num_quarantined = 0
        # Circular and doubly linked; index num_blocks is the list itself: its next is the head, its
        # previous the tail.
        self._next = [_UNLINKED] * num_blocks + [num_blocks]
        self._prev = [_UNLINKED] * num_blocks + [num_blocks]
        self._back = back
        self._num_backed = 0
        """The blocks below have their memory."""
        self._is_short = False
        """There was none for the next ones when it was asked for last."""
        self._may_ask = True
        if back is None:
            self._append(num_blocks)

    @property
    def num_free(self) -> int:
        """Blocks that ``allocate`` could hand out now, cached ones included, and those that are still without
        memory unless there was none for them."""
        return self._num_free + (0 if self._is_short else self.num_blocks - self._num_backed)

    def look_for_memory(self) -> None:
        """There may be some again: the next ``has`` or ``allocate`` that wants it asks."""
        self._may_ask = True

    def has(self, count: int) -> bool:
        """Could ``allocate`` hand out so many now? Takes memory for them where there is some."""
        if count > self._num_free:
            self._grow(count)
        return count <= self._num_free

    @property
    def num_cached(self) -> int:
        """Of the free ones, those that hold reusable prefixes."""
        return self._num_free_cached

    @property
    def num_quarantined(self) -> int:
        return self._num_quarantined

    @property
    def num_used(self) -> int:
        return self._num_backed - self._num_free - self._num_quarantined

    def ref_count(self, block: int) -> int:
        """References to ``block``; 0 when it is free or quarantined."""
        return self._ref_counts[self._checked(block)]

    def is_cached(self, block: int) -> bool:
        return bool(self._cached[self._checked(block)])

    def allocate(self, count: int) -> list[int]:
        """``count`` blocks with one reference each, or none at all and :class:`CacheFull`."""
        if count < 0:
            raise InternalError(f"allocate: count is {count}")
        self._grow(count)
        if count > self._num_free:
            raise CacheFull(f"{count} blocks needed, {self._num_free} free", retry_after_s=RETRY_AFTER_S)
        blocks = []
        for _ in range(count):
            # Read anew each time: on_evict may uncache free blocks, which moves them to the head.
            block = self._next[self.num_blocks]
            self._unlink(block)
            self._ref_counts[block] = 1
            blocks.append(block)
            if self._cached[block]:
                self._cached[block] = 0
                self._num_free_cached -= 1
                if self.on_evict is not None:
                    self.on_evict(block)
        return blocks

    def _grow(self, count: int) -> None:
        """Give more blocks their memory until ``count`` uncached ones are free, as far as there is some."""
        while self._num_free - self._num_free_cached < count and self._num_backed < self.num_blocks:
            if not self._may_ask or self._back is None:
                return
            end = self._back(self._num_backed, count - (self._num_free - self._num_free_cached))
            self._is_short = end <= self._num_backed
            self._may_ask = not self._is_short
            self._append(min(end, self.num_blocks))

    def _append(self, end: int) -> None:
        """The blocks below ``end`` have their memory: behind the last uncached one, in order."""
        list_head = self.num_blocks
        after = self._next[list_head]
        for _ in range(self._num_free - self._num_free_cached):
            after = self._next[after]
        for block in range(self._num_backed, end):
            before = self._prev[after]
            self._prev[block], self._next[block] = before, after
            self._next[before] = self._prev[after] = block
            self._num_free += 1
        self._num_backed = max(self._num_backed, end)

    def share(self, blocks: Iterable[int]) -> None:
        """One more reference to each; a free cached block leaves the free list."""
        for block in blocks:
            if self._ref_counts[self._checked(block)] == 0:
                if self._quarantined[block]:
                    raise InternalError(f"share: block {block} is quarantined")
                if not self._cached[block]:
                    raise InternalError(f"share: block {block} is free and holds nothing")
                self._unlink(block)
                self._num_free_cached -= 1
            self._ref_counts[block] += 1

    def free(self, blocks: Sequence[int]) -> None:
        """One reference less to each. ``blocks`` in the order of the sequence: they are freed from its
        end, so that the end of a chain is evicted before what it hangs on."""
        for block in reversed(blocks):
            count = self._ref_counts[self._checked(block)]
            if count == 0:
                raise InternalError(f"free: block {block} is not in use")
            self._ref_counts[block] = count - 1
            if count == 1:
                self._link(block)

    def quarantine(self, blocks: Iterable[int]) -> None:
        """Take blocks out of use without freeing them; each has one reference and is not cached."""
        for block in blocks:
            if self._ref_counts[self._checked(block)] != 1 or self._cached[block]:
                raise InternalError(
                    f"quarantine: block {block} has {self._ref_counts[block]} references, "
                    f"cached={bool(self._cached[block])}"
                )
            self._ref_counts[block] = 0
            self._quarantined[block] = 1
            self._num_quarantined += 1

    def discharge(self, blocks: Iterable[int]) -> None:
        """Free quarantined blocks: no writer can reach them any more."""
        for block in blocks:
            if not self._quarantined[self._checked(block)]:
                raise InternalError(f"discharge: block {block} is not quarantined")
            self._quarantined[block] = 0
            self._num_quarantined -= 1
            self._link(block)

    def mark_cached(self, block: int) -> None:
        """The prefix cache can find this block. Only a used block can become cached."""
        if self._ref_counts[self._checked(block)] == 0 or self._cached[block]:
            raise InternalError(
                f"mark_cached: block {block} has {self._ref_counts[block]} references, "
                f"cached={bool(self._cached[block])}"
            )
        self._cached[block] = 1

    def unmark_cached(self, block: int) -> None:
        """The prefix cache has dropped this block; if it is free, it is the next one taken."""
        if not self._cached[self._checked(block)]:
            raise InternalError(f"unmark_cached: block {block} is not cached")
        if self._ref_counts[block] == 0:
            self._unlink(block)
            self._num_free_cached -= 1
            self._cached[block] = 0
            self._link(block)
        else:
            self._cached[block] = 0

    def check_integrity(self) -> None:
        """O(num_blocks). Raises :class:`InternalError` that says what is broken."""
        linked = self._walk()
        num_used = 0
        for block in range(self.num_blocks):
            count = self._ref_counts[block]
            states = (block in linked) + (count > 0) + self._quarantined[block]
            if count < 0 or states != (block < self._num_backed):
                raise InternalError(
                    f"block {block}: {count} references, linked={block in linked}, "
                    f"quarantined={bool(self._quarantined[block])}"
                )
            if self._quarantined[block] and self._cached[block]:
                raise InternalError(f"block {block} is quarantined and cached")
            num_used += count > 0
        counts = (
            ("num_free", self._num_free, len(linked)),
            ("num_used", self.num_used, num_used),
            ("num_quarantined", self._num_quarantined, sum(self._quarantined)),
            ("num_cached", self._num_free_cached, sum(self._cached[block] for block in linked)),
        )
        for name, counted, found in counts:
            if counted != found:
                raise InternalError(f"{name} is {counted}, but {found} blocks are")
        if self._num_free + num_used + self._num_quarantined != self._num_backed:
            raise InternalError("free, used and quarantined blocks are not all that have memory")

    def _checked(self, block: int) -> int:
        # A negative id would silently name a block from the end.
        if not 0 <= block < self.num_blocks:
            raise InternalError(f"block {block} is outside 0 to {self.num_blocks - 1}")
        return block

    def _link(self, block: int) -> None:
        """Into the free list: behind the tail if cached, before the head if not."""
        end = self.num_blocks
        if self._cached[block]:
            before, after = self._prev[end], end
            self._num_free_cached += 1
        else:
            before, after = end, self._next[end]
        self._prev[block], self._next[block] = before, after
        self._next[before] = self._prev[after] = block
        self._num_free += 1

    def _unlink(self, block: int) -> None:
        before, after = self._prev[block], self._next[block]
        self._next[before], self._prev[after] = after, before
        self._prev[block] = self._next[block] = _UNLINKED
        self._num_free -= 1

    def _walk(self) -> set[int]:
        """The blocks in the free list; checks each link, and that no uncached block follows a cached one."""
        end = self.num_blocks
        linked: set[int] = set()
        before, block, seen_cached = end, self._next[end], False
        while block != end:
            if not 0 <= block < end or block in linked or self._prev[block] != before:
                raise InternalError(f"free list: {before} is followed by {block}, whose link back is wrong")
            if seen_cached and not self._cached[block]:
                raise InternalError(f"free list: uncached block {block} follows a cached one")
            seen_cached = seen_cached or bool(self._cached[block])
            linked.add(block)
            before, block = block, self._next[block]
        if self._prev[end] != before:
            raise InternalError(f"free list: its tail is {self._prev[end]}, but {before} comes last")
        return linked
