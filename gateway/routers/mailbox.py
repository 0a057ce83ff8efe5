"""Where the bus leaves tokens for HTTP handlers; delivering never waits, taking merges what has come.

One ``Mailbox`` a request on the bus, one ``Inbox`` for those of one HTTP request. A slow reader costs
merging: a mailbox holds at most ``max_tokens`` tokens and its prompt's rows, whatever the client does. Knows
neither sockets nor HTTP.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field

from microserve.protocol.errors import MeshError, ProtocolViolation
from microserve.protocol.messages.engine import TokenLogprob
from microserve.protocol.messages.numerics import UNKNOWN
from microserve.protocol.messages.request.prompt_logprobs import FIRST_POSITION, PromptLogprobs
from microserve.protocol.messages.router import Ended, Output, Served

MAX_TOKEN_ID = 0xFFFF_FFFF


@dataclass(slots=True)
class TokenBatch:
    """What has come for one request since it was last asked for."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    """As many as ``token_ids`` if the request asked for them, else none."""
    ended: Ended | None = None
    prompt: PromptLogprobs | None = None
    """The next ones of the prompt's own tokens, if the request asked for them."""


class Mailbox:
    """Tokens of one request on their way from the bus to the handler."""

    def __init__(
        self,
        inbox: Inbox,
        request_id: str,
        index: int,
        *,
        max_tokens: int,
        with_logprobs: bool,
        num_scored: int = 0,
        cancel: Callable[[], None],
        adapter: str = "",
    ) -> None:
        """``num_scored``: prompt tokens whose log-probabilities come before the first token. ``cancel``
        asks the router to stop; it is called at most once, and never after the end."""
        self.request_id = request_id
        """As the router knows it."""
        self.index = index
        self.output = array("I")
        """All tokens so far: what another router would have to be told."""
        self.revision = ""
        """Of the model that made them, as the router said that brought the last ones."""
        self.adapter = adapter
        self.adapter_revision = ""
        """As ``revision``."""
        self.numerics = UNKNOWN
        """In which class they were made, as far as routers have said."""
        self.served: Served | None = None
        """By what, as the router said that brought the first ones."""
        self.num_repeated = 0
        """Tokens that came once more and were dropped; a router that keeps its promises sends none."""
        self.ended: Ended | None = None
        self.failed: MeshError | None = None
        self.first_at: float | None = None
        """When the first token came, by the clock of whoever delivers."""
        self._inbox = inbox
        self._max_tokens = max_tokens
        self._with_logprobs = with_logprobs
        self._next_row, self._end_row = FIRST_POSITION, num_scored
        """Positions in the prompt: of the row that comes next, and behind the last."""
        self._cancel = cancel
        self._cancelled = False
        self._is_class_told = False
        """By the router that has it now."""
        self._batch = TokenBatch()
        inbox.add(self)

    @property
    def over(self) -> bool:
        """Nothing more will come."""
        return self.ended is not None or self.failed is not None

    @property
    def has_begun(self) -> bool:
        """Some of its answer is here."""
        return bool(self.output) or self._next_row > FIRST_POSITION

    @property
    def is_scored(self) -> bool:
        """All that was to come of its prompt is here."""
        return self._next_row >= self._end_row

    @property
    def num_waiting(self) -> int:
        return len(self._batch.token_ids)

    def deliver(self, output: Output, now: float) -> None:
        """Take one output. What breaks the stream's contract ends the request, and only it."""
        if self.over:
            return
        try:
            self._append(output)
        except ProtocolViolation as error:
            self.cancel()
            self.fail(error)
            return
        if self.first_at is None and len(self.output):
            self.first_at = now
        if output.numerics is not None:
            self.numerics, self._is_class_told = output.numerics, True
        elif (output.token_ids or output.prompt) and not self._is_class_told:
            self.numerics = UNKNOWN
        if self.served is None:
            self.served = output.served
        if output.ended is not None:
            self.ended = self._batch.ended = output.ended
            if output.ended.numerics.name:
                self.numerics = output.ended.numerics
        self._inbox.notify(self)

    def _append_rows(self, prompt: PromptLogprobs) -> None:
        """A repeated row brings nothing new."""
        last = self._batch.prompt
        is_fit = prompt.is_whole and prompt.end <= max(self._end_row, FIRST_POSITION)
        if not is_fit or prompt.begin > self._next_row or (last and last.num_top != prompt.num_top):
            raise ProtocolViolation(
                f"{self.request_id}: rows [{prompt.begin}, {prompt.end}) of the prompt came, expected "
                f"[{self._next_row}, {self._end_row})"
            )
        fresh = prompt.behind(self._next_row)
        if len(fresh):
            self._next_row = fresh.end
            self._batch.prompt = fresh if last is None else last.joined(fresh)

    def _append(self, output: Output) -> None:
        if output.prompt is not None:
            self._append_rows(output.prompt)
        is_whole = output.ended is not None and output.ended.reason in ("stop", "length")
        if (output.token_ids or is_whole) and not self.is_scored:
            raise ProtocolViolation(
                f"{self.request_id}: rows of the prompt from {self._next_row} on are missing"
            )
        duplicates = len(self.output) - output.offset
        if duplicates < 0:
            raise ProtocolViolation(
                f"{self.request_id}: token {output.offset} came, expected {len(self.output)}"
            )
        # A repeated output brings nothing new, one that overlaps brings its tail.
        self.num_repeated += min(duplicates, len(output.token_ids))
        token_ids = output.token_ids[duplicates:] if duplicates else output.token_ids
        if not token_ids:
            return
        if len(self.output) + len(token_ids) > self._max_tokens:
            raise ProtocolViolation(f"{self.request_id}: more than max_tokens = {self._max_tokens} tokens")
        if min(token_ids) < 0 or max(token_ids) > MAX_TOKEN_ID:
            raise ProtocolViolation(f"{self.request_id}: a token id is outside 32 bits")
        if self._with_logprobs:
            if len(output.logprobs) != len(output.token_ids):
                raise ProtocolViolation(
                    f"{self.request_id}: {len(output.logprobs)} logprobs for {len(output.token_ids)} tokens"
                )
            self._batch.logprobs += output.logprobs[duplicates:]
        self._batch.token_ids += token_ids
        self.output.extend(token_ids)

    def fail(self, error: MeshError) -> None:
        """End without ``Ended``: the router is lost or broke the contract. What came can still be taken."""
        if not self.over:
            self.failed = error
            self._inbox.notify(self)

    def take(self) -> TokenBatch:
        """Everything that has come; the mailbox is empty then."""
        batch, self._batch = self._batch, TokenBatch()
        return batch

    def take_rows(self) -> PromptLogprobs | None:
        """What has come of the prompt's own tokens; the rest stays."""
        rows, self._batch.prompt = self._batch.prompt, None
        return rows

    @property
    def has_failed(self) -> bool:
        """It has ended, and not as answers do."""
        is_well = self.ended is not None and self.ended.reason in ("stop", "length")
        return self.over and not is_well

    @property
    def is_cancelled(self) -> bool:
        return self._cancelled

    def travel(self, request_id: str, cancel: Callable[[], None]) -> None:
        """Another router has it now, under another name."""
        self.request_id, self._cancel = request_id, cancel
        self._is_class_told = False

    def cancel(self) -> None:
        """Nobody wants the rest. The mailbox stays known until the router confirms by ``Ended``."""
        if not self.over and not self._cancelled:
            self._cancelled = True
            self._cancel()


class Inbox:
    """The mailboxes of one HTTP request and the one handler that waits for them."""

    def __init__(self) -> None:
        self.mailboxes: list[Mailbox] = []
        self.error: MeshError | None = None
        self.take_at_once: Callable[[Mailbox], bool] | None = None
        """Asked while the handler waits: takes all that has come for a mailbox, without waiting and without
        raising; False: wake the handler. A token need not cost a task's turn."""
        self._ready: dict[Mailbox, None] = {}
        self._lets_others = False
        self._waiter: asyncio.Future[None] | None = None

    def add(self, mailbox: Mailbox) -> None:
        self.mailboxes.append(mailbox)

    def notify(self, mailbox: Mailbox) -> None:
        take = self.take_at_once
        if take is not None and not self._ready and self._is_awaited and take(mailbox):
            return
        self._ready[mailbox] = None
        self.poke()

    def notify_later(self, mailbox: Mailbox) -> None:
        """There is more of it, after a turn of the others."""
        self._ready[mailbox] = None
        self._lets_others = True

    @property
    def _is_awaited(self) -> bool:
        return self._waiter is not None and not self._waiter.done()

    def poke(self) -> None:
        """Let ``wait`` return, with nothing if there is nothing."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def fail(self, error: MeshError) -> None:
        """End the whole request: client gone, deadline, shutdown. The first error wins."""
        if self.error is None:
            self.error = error
            self.cancel()
            self.poke()

    def cancel(self) -> None:
        for mailbox in self.mailboxes:
            mailbox.cancel()

    async def wait(self) -> list[Mailbox]:
        """Mailboxes with news, in order of arrival; none after a ``poke``. One handler waits at a time.

        Raises what ``fail`` was given, without handing out what came before it.
        """
        if self._lets_others:
            self._lets_others = False
            await asyncio.sleep(0)
        if not self._ready and self.error is None:
            await self._sleep()
        if self.error is not None:
            raise self.error
        ready = list(self._ready)
        self._ready.clear()
        return ready

    async def settle(self, timeout_s: float) -> None:
        """Wait until every mailbox is over, for ``timeout_s`` at most (usage of what was cancelled)."""
        if self._all_over():
            return
        try:
            async with asyncio.timeout(timeout_s):
                while not self._all_over():
                    await self._sleep()
        except TimeoutError:
            return

    def _all_over(self) -> bool:
        return all(mailbox.over for mailbox in self.mailboxes)

    async def _sleep(self) -> None:
        waiter = self._waiter = asyncio.get_running_loop().create_future()
        try:
            await waiter
        finally:
            self._waiter = None
