"""What waits to go to one consumer of token streams: merged by request, sent by credit (WIRE.md 3.4).

Sans-I/O. Without credit it merges and drops nothing: a slow consumer costs memory for at most its requests'
own output. Does not know which message carries the items, nor who produced them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import msgspec

from microserve.protocol.bus.credit import CreditWindow
from microserve.protocol.messages.engine import TokenLogprob

MAX_STREAM_TOKENS = 16_384
"""In one message: with 20 log-probabilities each they stay below ``codec.MAX_MESSAGE_NBYTES``."""

Item = TypeVar("Item")
End = TypeVar("End")


class _Waiting(msgspec.Struct, Generic[Item, End]):
    offset: int
    token_ids: list[int]
    logprobs: list[TokenLogprob]
    end: End | None
    item: Item | None
    """All of this, whose lists these are; None: they are ours."""


class StreamQueue(Generic[Item, End]):
    """``Delta`` with ``Finished`` from an engine, ``Output`` with ``Ended`` from a router."""

    def __init__(
        self, item: Callable[[str, int, list[int], list[TokenLogprob], End | None], Item], credit: int
    ) -> None:
        """``item`` makes one of request id, offset, tokens, log-probabilities and the end, if it is there."""
        self.window = CreditWindow(credit)
        self._item = item
        self._waiting: dict[str, _Waiting[Item, End]] = {}
        """By request, in the order of the first token that waits."""

    def __len__(self) -> int:
        return len(self._waiting)

    def add(
        self,
        request_id: str,
        offset: int,
        token_ids: list[int],
        logprobs: list[TokenLogprob],
        end: End | None = None,
        item: Item | None = None,
    ) -> None:
        """Queue behind what waits for the same request; offsets follow each other. Behind an end comes the
        request's next life: what waits of the last one is dropped. ``item``: all of this, which goes out as
        it is if nothing joins it."""
        waiting = self._waiting.get(request_id)
        if waiting is None or waiting.end is not None:
            if item is None:
                token_ids, logprobs = token_ids.copy(), logprobs.copy()
            self._waiting[request_id] = _Waiting(offset, token_ids, logprobs, end, item)
            return
        self._open(waiting)
        if item is not None:
            self._join(item)
        waiting.token_ids += token_ids
        waiting.logprobs += logprobs
        waiting.end = end

    def _open(self, waiting: _Waiting[Item, End]) -> None:
        """What it was is not sent as it is."""
        if waiting.item is not None:
            self._join(waiting.item)
            waiting.item = None
            waiting.token_ids, waiting.logprobs = waiting.token_ids.copy(), waiting.logprobs.copy()

    def _join(self, item: Item) -> None:
        """The item becomes a part of others, which are made of what every queue knows of one."""

    def drop(self, request_id: str) -> None:
        """Its consumer wants no more of it. Unknown ids are fine."""
        self._waiting.pop(request_id, None)

    def take(self) -> list[Item]:
        """The items of one message, as many as fit; none when nothing waits or there is no credit."""
        if not self._waiting or not self.window.take():
            return []
        items: list[Item] = []
        room = MAX_STREAM_TOKENS
        while self._waiting and room > 0:
            request_id = next(iter(self._waiting))
            waiting = self._waiting[request_id]
            count = len(waiting.token_ids)
            if count > room:
                self._open(waiting)
                head, waiting.token_ids = waiting.token_ids[:room], waiting.token_ids[room:]
                logprobs, waiting.logprobs = waiting.logprobs[:room], waiting.logprobs[room:]
                items.append(self._item(request_id, waiting.offset, head, logprobs, None))
                waiting.offset += room
                break
            del self._waiting[request_id]
            items.append(
                waiting.item
                or self._item(request_id, waiting.offset, waiting.token_ids, waiting.logprobs, waiting.end)
            )
            room -= count
        return items
