"""Requests whose router is lost: they go on at another one, behind the output that is here (WIRE.md 5).

Owns what is needed to send a request again: its prompt as it travels, within a budget, and its deadline.
Tokens depend on (seed, position) alone, so the client sees one stream. Knows links and mailboxes, not HTTP.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import structlog

from microserve.gateway.routers.link import RouterLink
from microserve.gateway.routers.mailbox import Mailbox
from microserve.protocol import log
from microserve.protocol.bus.codec import encode_tokens
from microserve.protocol.errors import InternalError, MeshError, NoEngines
from microserve.protocol.messages.numerics import UNKNOWN
from microserve.protocol.messages.router import Generate
from microserve.protocol.request_id import moved

MAX_MOVES = 4
"""Routers that one request may outlive: it may be what ends them."""
MAX_PROMPT_NBYTES = 64 << 10
"""A longer prompt (16,384 tokens) is not kept: such a request ends with its router."""
MAX_KEPT_NBYTES = 128 << 20
"""Of all prompts and grammars together; beyond it new ones are not kept."""

_logger = structlog.get_logger()


@dataclass(slots=True, eq=False)
class _Kept:
    message: Generate
    prompt: bytes
    deadline: float
    """By the clock of :class:`Moves`."""
    num_moves: int = 0
    lost_at: float = 0.0
    error: MeshError | None = None
    """Why it has no router now."""

    @property
    def nbytes(self) -> int:
        """Of what can be long in it."""
        grammar = self.message.sampling.grammar
        return len(self.prompt) + (0 if grammar is None else len(grammar.text))


class Moves:
    """``keep`` each request; ``lost`` when its router is; ``place`` every interval; ``forget`` at the end."""

    def __init__(
        self, choose: Callable[[str], RouterLink], *, patience_s: float, clock: Callable[[], float]
    ) -> None:
        """``choose``: the router for the next request with that adapter, or :class:`NoEngines`. A request
        waits for one for ``patience_s``. ``clock``: monotonic, seconds."""
        self.kept_nbytes = 0
        self._choose = choose
        self._patience_s = patience_s
        self._clock = clock
        self._kept: dict[Mailbox, _Kept] = {}
        self._homeless: dict[Mailbox, _Kept] = {}

    @property
    def is_busy(self) -> bool:
        """Some have no router now."""
        return bool(self._homeless)

    def keep(self, mailbox: Mailbox, message: Generate, prompt: bytes) -> None:
        """Remember how to send it again, if that is not too much."""
        kept = _Kept(message, prompt, self._clock() + message.ttl_s)
        if len(prompt) > MAX_PROMPT_NBYTES or self.kept_nbytes + kept.nbytes > MAX_KEPT_NBYTES:
            return
        self.kept_nbytes += kept.nbytes
        self._kept[mailbox] = kept

    def forget(self, mailbox: Mailbox) -> None:
        kept = self._kept.pop(mailbox, None)
        if kept is not None:
            self.kept_nbytes -= kept.nbytes
            self._homeless.pop(mailbox, None)

    def lost(self, mailboxes: list[Mailbox], error: MeshError) -> None:
        """The router of these is gone, or stops. What cannot go on elsewhere fails with ``error``."""
        for mailbox in mailboxes:
            kept = self._kept.get(mailbox)
            if kept is None or mailbox.is_cancelled or kept.num_moves >= MAX_MOVES:
                mailbox.fail(error)
                continue
            kept.lost_at, kept.error = self._clock(), error
            self._homeless[mailbox] = kept
        self.place()

    def fail_all(self, error: MeshError) -> None:
        """End those that have no router now."""
        homeless, self._homeless = list(self._homeless), {}
        for mailbox in homeless:
            mailbox.fail(error)

    def place(self) -> None:
        """Find a router for those who have none."""
        now = self._clock()
        for mailbox, kept in list(self._homeless.items()):
            if mailbox.over or mailbox.is_cancelled or now - kept.lost_at > self._patience_s:
                del self._homeless[mailbox]
                if kept.error is not None:
                    mailbox.fail(kept.error)
                continue
            try:
                link = self._choose(kept.message.adapter)
            except NoEngines:
                continue
            try:
                sent = self._send(link, mailbox, kept, now)
            except Exception:  # whatever is wrong with this one, the others go on
                _logger.exception(log.BUS_HANDLER_FAILED, request_id=kept.message.request_id)
                mailbox.fail(InternalError("this request could not be sent"))
                sent = True
            if sent:
                del self._homeless[mailbox]

    def _send(self, link: RouterLink, mailbox: Mailbox, kept: _Kept, now: float) -> bool:
        kept.num_moves += 1
        request_id = moved(kept.message.request_id, kept.num_moves)
        output = encode_tokens(mailbox.output)
        message = msgspec.structs.replace(
            kept.message,
            request_id=request_id,
            ttl_s=max(kept.deadline - now, 0.001),
            num_output_tokens=len(mailbox.output),
            revision=mailbox.revision if mailbox.has_begun else "",
            numerics=mailbox.numerics if mailbox.has_begun else UNKNOWN,
            adapter_revision=mailbox.adapter_revision if mailbox.has_begun else "",
        )
        if not link.send(message, kept.prompt + output):
            return False
        _logger.info(
            log.REQUEST_CONTINUED,
            request_id=kept.message.request_id,
            code=kept.error.code if kept.error is not None else "",
            router_id=link.router_id,
            delivered=len(mailbox.output),
            attempt=kept.num_moves + 1,
        )
        mailbox.travel(request_id, lambda: link.cancel(request_id))
        link.mailboxes[request_id] = mailbox
        return True
