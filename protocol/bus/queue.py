"""What waits to go to one consumer of token streams: merged by request, sent by credit (WIRE.md 3.4).

Sans-I/O. Without credit it merges and drops nothing: a slow consumer costs memory for at most its requests'
own output and prompts' rows. Does not know which message carries the items, nor who produced them.
"""

from __future__ import annotations

from typing import Generic, Protocol, TypeVar

import msgspec

from microserve.protocol.bus.credit import CreditWindow
from microserve.protocol.messages.engine import TokenLogprob
from microserve.protocol.messages.request.prompt_logprobs import PromptLogprobs, row_nbytes

MAX_STREAM_TOKENS = 16_384
"""In one message: with 20 log-probabilities each they stay below ``codec.MAX_MESSAGE_NBYTES``."""
MAX_STREAM_PROMPT_NBYTES = 1 << 18
"""Of prompts' log-probabilities in one message. A long prompt has more: its rows come in pieces, with the
tokens of others in between."""

Item = TypeVar("Item")
Item_co = TypeVar("Item_co", covariant=True)
End = TypeVar("End")
End_contra = TypeVar("End_contra", contravariant=True)


class MakeItem(Protocol[End_contra, Item_co]):
    def __call__(
        self,
        request_id: str,
        offset: int,
        token_ids: list[int],
        logprobs: list[TokenLogprob],
        end: End_contra | None,
        /,
        *,
        prompt: PromptLogprobs | None = None,
    ) -> Item_co: ...


class _Waiting(msgspec.Struct, Generic[Item, End]):
    offset: int
    token_ids: list[int]
    logprobs: list[TokenLogprob]
    end: End | None
    item: Item | None
    """All of this, whose lists these are; None: they are ours."""
    prompt: PromptLogprobs | None


class StreamQueue(Generic[Item, End]):
    """``Delta`` with ``Finished`` from an engine, ``Output`` with ``Ended`` from a router."""

    def __init__(self, item: MakeItem[End, Item], credit: int) -> None:
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
        prompt: PromptLogprobs | None = None,
    ) -> None:
        """Queue behind what waits for the same request; offsets follow each other, and so do the rows of its
        prompt. Behind an end comes the request's next life: what waits of the last one is dropped. ``item``:
        all of this, which goes out as it is if nothing joins it."""
        waiting = self._waiting.get(request_id)
        if waiting is None or waiting.end is not None:
            if item is None:
                token_ids, logprobs = token_ids.copy(), logprobs.copy()
            self._waiting[request_id] = _Waiting(offset, token_ids, logprobs, end, item, prompt)
            return
        self._open(waiting)
        if item is not None:
            self._join(item)
        waiting.token_ids += token_ids
        waiting.logprobs += logprobs
        waiting.end = end
        if prompt is not None:
            waiting.prompt = prompt if waiting.prompt is None else waiting.prompt.joined(prompt)

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
        room, prompt_nbytes = MAX_STREAM_TOKENS, MAX_STREAM_PROMPT_NBYTES
        for request_id, waiting in list(self._waiting.items()):
            prompt = waiting.prompt
            if prompt is not None and len(prompt.rows) > prompt_nbytes:
                if (piece := self._cut_prompt(request_id, waiting, prompt, prompt_nbytes)) is not None:
                    items.append(piece)
                prompt_nbytes = 0
                continue
            count = len(waiting.token_ids)
            if count > room:
                self._open(waiting)
                head, waiting.token_ids = waiting.token_ids[:room], waiting.token_ids[room:]
                logprobs, waiting.logprobs = waiting.logprobs[:room], waiting.logprobs[room:]
                items.append(self._made(request_id, waiting, head, logprobs, None, prompt))
                waiting.offset, waiting.prompt = waiting.offset + room, None
                break
            del self._waiting[request_id]
            made = waiting.item or self._made(
                request_id, waiting, waiting.token_ids, waiting.logprobs, waiting.end, prompt
            )
            items.append(made)
            room -= count
            prompt_nbytes -= 0 if prompt is None else len(prompt.rows)
            if room <= 0:
                break
        return items

    def _cut_prompt(
        self, request_id: str, waiting: _Waiting[Item, End], prompt: PromptLogprobs, nbytes: int
    ) -> Item | None:
        """Rows of ``prompt`` for this message, if there is room for any; the rest waits behind the others."""
        position = prompt.begin + nbytes // row_nbytes(prompt.num_top)
        if position == prompt.begin:
            return None
        self._open(waiting)
        del self._waiting[request_id]
        piece = self._made(request_id, waiting, [], [], None, prompt.until(position))
        waiting.prompt = prompt.behind(position)
        self._waiting[request_id] = waiting
        return piece

    def _made(
        self,
        request_id: str,
        waiting: _Waiting[Item, End],
        token_ids: list[int],
        logprobs: list[TokenLogprob],
        end: End | None,
        prompt: PromptLogprobs | None,
    ) -> Item:
        if prompt is None:
            return self._item(request_id, waiting.offset, token_ids, logprobs, end)
        return self._item(request_id, waiting.offset, token_ids, logprobs, end, prompt=prompt)
