"""All routers of this gateway: which one takes a request, who is alive, and the heartbeat that tells them so.

Owns the links and one task. Knows token ids and requests, not text.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from microserve.gateway.routers.failover import Moves
from microserve.gateway.routers.link import NO_LOAD, EnginesLoad, ModelLimits, RouterLink
from microserve.gateway.routers.mailbox import Inbox, Mailbox
from microserve.protocol.bus.address import url_towards
from microserve.protocol.bus.codec import encode_tokens
from microserve.protocol.bus.peers import Peers
from microserve.protocol.bus.transport import Bus
from microserve.protocol.errors import ConfigError, MeshError, NoEngines, QueueFull
from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.protocol.messages.router import Generate
from microserve.protocol.process.pace import Pace
from microserve.protocol.process.surviving import surviving
from microserve.protocol.process.tick import at_rest

_ADDRESS = re.compile(r"tcp://\S+:\d{1,5}|ipc://\S+|inproc://\S+")


class RouterClient:
    """Sends requests to the least busy live router. Make it inside the running loop."""

    def __init__(
        self,
        bus: Bus,
        addresses: Sequence[str],
        *,
        gateway_id: str,
        incarnation: int,
        model: str,
        credit: int,
        heartbeat_interval_s: float,
        liveness: int,
        clock: Callable[[], float],
        url: str = "",
    ) -> None:
        """``liveness`` missed intervals make a router lost. ``clock``: monotonic, seconds; finer than a
        millisecond where the times of tokens matter. ``url``: where HTTP is bound.

        Raises :class:`ConfigError` for an address that is none.
        """
        for address in addresses:
            if _ADDRESS.fullmatch(address) is None:
                raise ConfigError(f"gateway.routers: {address!r} is no address", field="gateway.routers")
        self._loop = asyncio.get_running_loop()
        self._patience_s = 2 * heartbeat_interval_s * liveness
        self._clock = clock
        self._pace = Pace(heartbeat_interval_s, liveness, self._is_busy)
        self._next_s = 0.0
        """As our last pings said."""
        self._moves = Moves(self.choose, patience_s=self._patience_s, clock=clock)
        self.links = [
            RouterLink(
                bus,
                address,
                gateway_id=gateway_id,
                incarnation=incarnation,
                credit=credit,
                url=url_towards(url, address) if url else "",
                clock=clock,
                on_lost=self._moves.lost,
                on_heard=self._heard,
                on_speaks=self._pace.stir,
            )
            for address in dict.fromkeys(addresses)  # a router has one connection of a gateway
        ]
        self._model = model
        self._interval_s = at_rest(heartbeat_interval_s, liveness)
        self._routers: Peers[str, RouterLink] = Peers(
            interval_s=self._interval_s, silence_s=heartbeat_interval_s * liveness
        )
        """By address, from our hello on. Which life of it answers is the link's to judge."""
        self._task: asyncio.Task[None] | None = None

    def start(self) -> asyncio.Task[None]:
        """Begin; the task ends only by ``close`` or by a bug."""
        for link in self.links:
            with surviving("connection to a router", address=link.address):
                link.connect()
        self._task = self._loop.create_task(self._beat(), name="router heartbeat")
        return self._task

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        for link in self.links:
            link.close()

    def fail_all(self, error: MeshError) -> None:
        """End every request with ``error``, and tell the routers so."""
        for link in self.links:
            for mailbox in list(link.mailboxes.values()):
                mailbox.cancel()
            link.fail_all(error)
        self._moves.fail_all(error)

    async def _beat(self) -> None:
        while True:
            await self._pace.tick(self._next_s, self._interval_s)
            now, next_s = self._clock(), self._pace.next_s
            for link in self.links:
                if self._next_s and not next_s:  # whom we ask answers as soon as any (WIRE.md 3.5)
                    self._routers.rouse(link.address, now)
            self._next_s = next_s
            for link in self.links:
                with surviving("heartbeat", address=link.address):
                    if link.is_open:
                        link.ping(next_s)
                    else:  # there was no socket to be had
                        link.connect()
            for router, _ in self._routers.expire(self._clock(), next_s):
                with surviving("loss of a router", address=router.value.address):
                    router.value.lose("silent")
                with surviving("connection to a router", address=router.value.address):
                    router.value.connect()
            with surviving("requests without a router"):
                self._moves.place()

    def _is_busy(self) -> bool:
        all_know = all(link.joined and link.is_paced for link in self.links)
        return bool(self.num_requests) or self._moves.is_busy or not all_know

    def _heard(self, link: RouterLink, next_s: float | None) -> None:
        """Something came from there, or a hello of ours went: until an answer is due, that counts as much."""
        if next_s and not self._next_s:
            return  # sent before it was asked, and no answer
        if self._routers.heard(link.address, link.seen_at, next_s=next_s) is None:
            self._routers.join(link.address, link.address, 0, link, link.seen_at)

    def is_usable(self, link: RouterLink) -> bool:
        """May requests be sent there?"""
        return link.joined and link.num_engines > 0 and link.model == self._model

    @property
    def ready(self) -> bool:
        """A router with an engine of our model is known."""
        return any(self.is_usable(link) for link in self.links)

    @property
    def max_model_len(self) -> int:
        """Tokens of the model's context; 0 while no router is known."""
        return max((link.limits.max_model_len for link in self.links if self.is_usable(link)), default=0)

    @property
    def engines_load(self) -> EnginesLoad:
        """Of all engines together, as the busiest of the usable routers sees them: all see the same ones."""
        loads = (link.engines_load for link in self.links if self.is_usable(link))
        return max(loads, key=lambda load: load.num_running + load.num_waiting, default=NO_LOAD)

    @property
    def adapters(self) -> list[str]:
        """Names of those that engines of our model have now, as any router says."""
        return sorted({name for link in self.links if self.is_usable(link) for name in link.adapters})

    @property
    def known_adapters(self) -> set[str]:
        """Names of those that they have, or have had: the engines may come back."""
        return set().union(*(link.known_adapters for link in self.links if link.model in ("", self._model)))

    def choose(self, adapter: str = "") -> RouterLink:
        """The usable router with the fewest of our requests, of those whose engines have the adapter, if one
        is named. Raises :class:`NoEngines`."""
        usable = [link for link in self.links if self.is_usable(link)]
        fitting = [link for link in usable if not adapter or adapter in link.adapters]
        if fitting:
            return min(fitting, key=lambda link: len(link.mailboxes))
        if usable:
            raise NoEngines(f"no engine has the adapter {adapter[:128]!r} at the moment", retry_after_s=1.0)
        others = sorted({link.model for link in self.links if link.joined and link.model} - {self._model})
        if others:
            raise NoEngines(f"the routers serve {', '.join(others)}; this gateway is for {self._model}")
        if any(link.joined for link in self.links):
            raise NoEngines(f"no engine serves {self._model} at the moment")
        raise NoEngines("no router answers at the moment")

    def choose_soon(self, adapter: str = "") -> RouterLink | None:
        """As :meth:`choose`; None if there is no router, but one was here a moment ago: it, or its next life,
        is on its way back (after a pause of our own, say), and :meth:`generate` waits for it."""
        try:
            return self.choose(adapter)
        except NoEngines:
            if all(self._clock() - link.lost_at > self._patience_s for link in self.links):
                raise
            return None

    @property
    def limits(self) -> ModelLimits:
        """Of the router that would take a request now, or was the last to say.

        Raises :class:`NoEngines`, also while nobody has said: limits that are unknown refuse nobody.
        """
        link = self.choose_soon()
        if link is None:
            link = max(self.links, key=lambda each: (each.limits.are_known, each.lost_at))
        if not link.limits.are_known:
            raise NoEngines("no engine has told the limits of the model yet")
        return link.limits

    def eos_token_ids(self) -> frozenset[int]:
        """Of our model, as far as any router has said."""
        links = (link for link in self.links if link.model in ("", self._model))
        return frozenset().union(*(link.limits.eos_token_ids for link in links))

    @property
    def known_limits(self) -> ModelLimits:
        """As :attr:`limits`; zeros where it raises."""
        try:
            return self.limits
        except NoEngines:
            return ModelLimits(0, 0)

    def generate(
        self,
        inbox: Inbox,
        link: RouterLink | None,
        *,
        request_id: str,
        index: int,
        tokens: Sequence[int],
        sampling: SamplingParams,
        ttl_s: float,
        strategy: str | None,
        salt: str = "",
        tenant: str = "",
        priority: int = 0,
        attributes: Mapping[str, str] | None = None,
        adapter: str = "",
        traceparent: str = "",
        exact: bool | None = None,
    ) -> Mailbox:
        """Send one request to ``link``, or to the next router that comes; its output will be in ``inbox``.
        ``adapter``: of the model, that is to answer; ``tenant`` is whose it is, ``priority`` how soon it is
        to go on where tenants must wait; strategies see these and ``attributes``. ``exact``: whether its KV
        may lose something (:class:`Generate`).

        Raises :class:`QueueFull`."""

        def cancel() -> None:
            if link is not None:
                link.cancel(request_id)

        mailbox = Mailbox(
            inbox,
            request_id,
            index,
            max_tokens=sampling.max_tokens,
            with_logprobs=sampling.logprobs is not None,
            num_scored=0 if sampling.prompt_logprobs is None else len(tokens),
            cancel=cancel,
            adapter=adapter,
        )
        message = Generate(
            request_id=request_id,
            model=self._model,
            sampling=sampling,
            ttl_s=ttl_s,
            strategy=strategy,
            salt=salt,
            tenant=tenant,
            priority=priority,
            attributes=dict(attributes or {}),
            adapter=adapter,
            traceparent=traceparent,
            exact=exact,
        )
        prompt = encode_tokens(tokens)
        if link is None:
            self._moves.keep(mailbox, message, prompt)
            self._moves.lost([mailbox], NoEngines("no router answers at the moment"))
            return mailbox
        assert request_id not in link.mailboxes
        if not link.send(message, prompt):
            error = QueueFull("the queue to the router is full", retry_after_s=1.0)
            mailbox.fail(error)
            raise error
        link.mailboxes[request_id] = mailbox
        self._moves.keep(mailbox, message, prompt)
        return mailbox

    def forget(self, mailbox: Mailbox) -> None:
        """The request is over for us; should it still run, its next output is answered by a cancel."""
        self._moves.forget(mailbox)
        for link in self.links:
            if link.mailboxes.get(mailbox.request_id) is mailbox:
                del link.mailboxes[mailbox.request_id]

    @property
    def num_requests(self) -> int:
        """On the bus, at routers that are here."""
        return sum(len(link.mailboxes) for link in self.links)

    @property
    def kept_nbytes(self) -> int:
        """Of prompts, for the case that a router is lost."""
        return self._moves.kept_nbytes

    @property
    def num_waiting_tokens(self) -> int:
        """Tokens in mailboxes, not yet taken by a handler."""
        return sum(mailbox.num_waiting for link in self.links for mailbox in link.mailboxes.values())

    def status(self) -> list[dict[str, Any]]:
        return [link.status() for link in self.links]
