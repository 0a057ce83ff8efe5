"""A gateway in a simulated process: the real one's side towards routers, with requests in and token ids out.

Owns what each client would have seen, and says where a stream broke its promises. Connections, credit,
loss and the move to another router are gateway/routers themselves, on the process's clock. HTTP and text
stay outside: ``_serve`` stands where a handler of an HTTP request does, and knows its client by an
:class:`Answer`.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import structlog

from microserve.gateway.routers.client import RouterClient
from microserve.gateway.routers.link import RouterLink
from microserve.gateway.routers.mailbox import Inbox, Mailbox
from microserve.protocol import log
from microserve.protocol.bus.transport import Bus
from microserve.protocol.errors import MeshError, ProtocolViolation
from microserve.protocol.messages.engine import TokenLogprob
from microserve.protocol.messages.numerics import UNKNOWN, Numerics
from microserve.protocol.messages.request.prompt_logprobs import PromptLogprobs
from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.protocol.messages.router import Ended
from microserve.protocol.settings.settings import BusSettings
from microserve.services.simulation.engine.engine import MODEL
from microserve.services.simulation.loop import Process, VirtualLoop

_logger = structlog.get_logger()


@dataclass
class Answer:
    """One request as its client sees it. Times are the simulation's own."""

    request_id: str
    prompt: list[int]
    params: SamplingParams
    submitted_at: float
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    rows: PromptLogprobs | None = None
    """Of the prompt's own tokens."""
    outcome: str = ""
    """Empty until there is one: ``stop``, ``length``, ``abort``, an error's code, or ``gateway_lost``."""
    detail: str = ""
    first_token_at: float = 0.0
    """0 until there is a token."""
    ended_at: float = 0.0
    ended: Ended | None = None
    """What the router said at the end."""
    numerics: Numerics = UNKNOWN
    """What it was told last of the class of what it has."""
    promises: dict[str, int] = field(default_factory=dict)
    """Exact classes that it was told of, and how many tokens it had when it was last told so."""
    is_cancelled: bool = False
    strategy: str = ""
    salt: str = ""
    tenant: str = ""
    priority: int = 0
    attributes: dict[str, str] = field(default_factory=dict)

    @property
    def is_complete(self) -> bool:
        return self.outcome in ("stop", "length")


class SimGateway:
    """One life of a gateway; make it in its process."""

    def __init__(
        self,
        loop: VirtualLoop,
        process: Process,
        bus: Bus,
        routers: list[str],
        *,
        gateway_id: str,
        incarnation: int,
        settings: BusSettings,
    ) -> None:
        """``routers``: their addresses."""
        self.answers: dict[str, Answer] = {}
        self.routers = RouterClient(
            bus,
            routers,
            gateway_id=gateway_id,
            incarnation=incarnation,
            model=MODEL,
            credit=settings.credit,
            heartbeat_interval_s=settings.heartbeat_interval_s,
            liveness=settings.liveness,
            clock=lambda: process.now,
        )
        self._loop = loop
        self._process = process
        self._mailboxes: dict[str, Mailbox] = {}
        self._violations: list[str] = []

    async def run(self) -> None:
        try:
            await self.routers.start()
        except Exception:
            _logger.exception(log.SERVICE_FAILED)
            raise
        finally:
            await self.routers.close()

    @property
    def num_usable(self) -> int:
        """Routers that have welcomed this gateway and have told it of engines."""
        return sum(map(self.routers.is_usable, self.routers.links))

    def submit(self, answer: Answer, address: str, *, ttl_s: float) -> None:
        """Send it to the router at ``address`` if that one is there, else to one that the gateway chooses."""
        self.answers[answer.request_id] = answer
        task = self._process.spawn(self._serve(answer, address, ttl_s), answer.request_id)
        task.add_done_callback(self._served)

    def _served(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._violations.append(f"{task.get_name()}: its handler raised {error!r}")

    def cancel(self, answer: Answer) -> None:
        """Its client leaves; a frozen gateway learns of it when it thaws."""
        answer.is_cancelled = True
        self._loop.call_soon(self._cancel, answer, context=self._process.context())

    def _cancel(self, answer: Answer) -> None:
        if answer.request_id in self._mailboxes:
            self._mailboxes[answer.request_id].cancel()

    async def _serve(self, answer: Answer, address: str, ttl_s: float) -> None:
        inbox = Inbox()
        try:
            mailbox = self.routers.generate(
                inbox,
                self._link(address),
                request_id=answer.request_id,
                index=0,
                tokens=answer.prompt,
                sampling=answer.params,
                ttl_s=ttl_s,
                strategy=answer.strategy or None,
                salt=answer.salt,
                tenant=answer.tenant,
                priority=answer.priority,
                attributes=answer.attributes,
            )
        except MeshError as error:
            self.end(answer, error.code, error.detail)
            return
        self._mailboxes[answer.request_id] = mailbox
        inbox.take_at_once = lambda mailbox: self._take_at_once(answer, mailbox)
        try:
            while not answer.outcome:
                await inbox.wait()
                self._take(answer, mailbox)
        finally:
            inbox.take_at_once = None
            self.routers.forget(mailbox)

    def _link(self, address: str) -> RouterLink | None:
        wanted = [link for link in self.routers.links if link.address == address]
        usable = [link for link in wanted if self.routers.is_usable(link)]
        return usable[0] if usable else self.routers.choose_soon()

    def _take_at_once(self, answer: Answer, mailbox: Mailbox) -> bool:
        """As the real one's handler of a stream: no task is woken for a token, but for the end."""
        if mailbox.over:
            return False
        self._take(answer, mailbox)
        return True

    def _take(self, answer: Answer, mailbox: Mailbox) -> None:
        if not self._process.is_alive:  # it is being unwound; nobody is there to be told
            return
        batch = mailbox.take()
        if batch.token_ids and not answer.token_ids:
            answer.first_token_at = self._loop.now
        answer.token_ids += batch.token_ids
        answer.logprobs += batch.logprobs
        if batch.prompt is not None:
            answer.rows = batch.prompt if answer.rows is None else answer.rows.joined(batch.prompt)
        answer.numerics = mailbox.numerics
        if answer.token_ids and answer.numerics.is_exact:
            answer.promises[answer.numerics.name] = len(answer.token_ids)
        if batch.ended is not None:
            answer.ended = batch.ended
            self.end(answer, batch.ended.code or batch.ended.reason, batch.ended.detail)
        elif mailbox.failed is not None:
            if isinstance(mailbox.failed, ProtocolViolation):  # a gap, or too many tokens
                self._violations.append(f"{answer.request_id}: {mailbox.failed.detail}")
            self.end(answer, mailbox.failed.code, mailbox.failed.detail)

    def end(self, answer: Answer, outcome: str, detail: str = "") -> None:
        if answer.outcome:
            if self._process.is_alive:
                self._violations.append(f"{answer.request_id} ended twice: {answer.outcome}, {outcome}")
            return
        answer.outcome, answer.detail, answer.ended_at = outcome, detail, self._loop.now

    def violations(self) -> list[str]:
        """What came that must not come: gaps, tokens twice, anything behind the end."""
        found = list(self._violations)
        for request_id, mailbox in self._mailboxes.items():
            if mailbox.num_repeated:
                found.append(f"{request_id}: {mailbox.num_repeated} tokens came twice")
            left = mailbox.take()
            if self.answers[request_id].ended is not None and (left.token_ids or left.ended is not None):
                found.append(f"{request_id}: {left} came behind its end")
        return found
