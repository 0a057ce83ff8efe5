"""The bus connection to one router: hello, liveness, credit, and the mailboxes of the requests sent there.

Owns one DEALER socket at a time and the routing of outputs to mailboxes. Never waits: outputs are taken as
they come and the credit given back at once, because mailboxes are bounded by ``max_tokens``.

    down --hello--> (welcome) joined --silence, a new incarnation, a lost message, a closed socket--> down

A socket that got no answer is closed and opened anew with one hello, so that nothing piles up in a queue to a
router that is not there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, assert_never

import structlog

from microserve.gateway.routers.mailbox import Mailbox
from microserve.protocol import log
from microserve.protocol.bus.codec import ROUTER_REPLY, ROUTER_REQUEST
from microserve.protocol.bus.credit import CreditMeter
from microserve.protocol.bus.numbered import NumberedClient
from microserve.protocol.bus.transport import Bus
from microserve.protocol.errors import Draining, MeshError, PeerError, ProtocolViolation
from microserve.protocol.messages.router import (
    Cancel,
    GatewayHello,
    GatewayPing,
    RouterFailed,
    RouterHeartbeat,
    RouterRequest,
    RouterWelcome,
    Stream,
    StreamCredit,
)
from microserve.protocol.process.surviving import surviving

_logger = structlog.get_logger()


class RouterLost(PeerError):
    """The router fell silent or restarted while it served the request; another try may succeed."""

    code = "router_lost"


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What the mesh says of the model; zeros until a router has said that it has an engine."""

    max_model_len: int
    vocab_size: int
    eos_token_ids: frozenset[int] = frozenset()

    @property
    def are_known(self) -> bool:
        return self.max_model_len > 0 and self.vocab_size > 0


@dataclass(frozen=True, slots=True)
class EnginesLoad:
    """Of all engines together, as a router says."""

    num_running: int
    num_waiting: int
    kv_usage: float
    """0 to 1."""


NO_LOAD = EnginesLoad(0, 0, 0.0)


class RouterLink:
    """One router as this gateway knows it."""

    def __init__(
        self,
        bus: Bus,
        address: str,
        *,
        gateway_id: str,
        incarnation: int,
        credit: int,
        url: str,
        clock: Callable[[], float],
        on_lost: Callable[[list[Mailbox], MeshError], None],
        on_heard: Callable[[RouterLink, float | None], None],
        on_speaks: Callable[[], None],
    ) -> None:
        """``on_lost`` takes over the requests of a router that is lost or stops. ``on_heard`` is told of each
        message, with its ``next_s`` if it has one; ``on_speaks`` of what we say beside signs of life.
        ``url``: of the gateway's HTTP, as the router's host reaches it."""
        self.address = address
        self.router_id = ""
        self.router_incarnation: int | None = None
        """None while the router has not welcomed us."""
        self.model = ""
        self.limits = ModelLimits(max_model_len=0, vocab_size=0)
        self.revision = ""
        """Of the model that it serves."""
        self.adapters: dict[str, str] = {}
        """That its engines have now: what each name stands for."""
        self.known_adapters: set[str] = set()
        """Names that they have had since we know it."""
        self.num_engines = 0
        self.num_requests = 0
        self.engines_load = NO_LOAD
        self.max_requests = 0
        self.mailboxes: dict[str, Mailbox] = {}
        self.is_paced = False
        """It knows ``next_s``."""
        self.seen_at = 0.0
        """By ``clock``, time of the router's last message, or of our hello."""
        self.lost_at = float("-inf")
        """By ``clock``, time at which it was last lost while it was joined."""
        self._bus = bus
        self._gateway_id = gateway_id
        self._incarnation = incarnation
        self._credit = credit
        self._url = url
        self._clock = clock
        self._on_lost = on_lost
        self._on_heard = on_heard
        self._on_speaks = on_speaks
        self._meter = CreditMeter(credit)
        self._socket: NumberedClient | None = None

    @property
    def joined(self) -> bool:
        return self.router_incarnation is not None

    def _reconnect(self) -> None:
        """If there is no socket to be had, the next heartbeat tries again."""
        with surviving("connection to a router", address=self.address):
            self.connect()

    @property
    def is_open(self) -> bool:
        """There is a socket, whoever is at its other end."""
        return self._socket is not None

    def connect(self) -> None:
        """(Re)open the socket and say hello."""
        self.close()
        self._socket = NumberedClient(
            self._bus, self.address, self._on_frames, self._on_loss, on_disconnect=self._on_disconnect
        )
        self._hello()

    def close(self) -> None:
        socket, self._socket = self._socket, None
        if socket is not None:
            socket.close()

    def _hello(self) -> None:
        self.seen_at = self._clock()
        self._on_heard(self, 0.0)
        self._meter = CreditMeter(self._credit)
        self.send(GatewayHello(self._gateway_id, self._incarnation, self._credit, self._url))

    def send(self, message: RouterRequest, *bulk: bytes) -> bool:
        """False when the queue to the router is full or there is no socket."""
        if not isinstance(message, GatewayPing):
            self._on_speaks()
        return self._socket is not None and self._socket.send(ROUTER_REQUEST.encode(message, *bulk))

    def ping(self, next_s: float) -> None:
        """Keep the router's side of the connection and our requests alive; the next one comes in ``next_s``,
        if that is not 0."""
        if self.joined:
            self.send(GatewayPing(self._incarnation, next_s))

    def cancel(self, request_id: str) -> None:
        self.send(Cancel(request_id))

    def lose(self, reason: str) -> None:
        """The router is gone, or is another life: its requests go on elsewhere, or end to be retried."""
        if self.joined:
            _logger.warning(
                log.ROUTER_LOST,
                router_id=self.router_id,
                address=self.address,
                reason=reason,
                num_requests=len(self.mailboxes),
            )
            self.lost_at = self._clock()
        self.router_incarnation = None
        self.num_engines = 0
        mailboxes, self.mailboxes = list(self.mailboxes.values()), {}
        error = RouterLost(f"router {self.router_id or self.address} was lost ({reason}); try again")
        self._on_lost(mailboxes, error)

    def fail_all(self, error: MeshError) -> None:
        mailboxes, self.mailboxes = self.mailboxes, {}
        for mailbox in mailboxes.values():
            mailbox.fail(error)

    def _on_loss(self, detail: str) -> None:
        self.lose(detail)
        self._reconnect()

    def _on_disconnect(self) -> None:
        """Without a welcome there is nothing to lose, and the hello may still be delivered."""
        if self.joined:
            self.lose("closed the connection")
            self._reconnect()

    def _on_frames(self, frames: list[bytes]) -> None:
        try:
            message, _ = ROUTER_REPLY.decode(frames)
        except ProtocolViolation as error:
            _logger.warning(log.FRAME_REJECTED, address=self.address, detail=error.detail)
            return
        if isinstance(message, RouterFailed):
            self._on_failed(message)
            return
        self.seen_at = self._clock()
        self._on_heard(self, message.next_s if isinstance(message, RouterHeartbeat) else None)
        match message:
            case Stream():
                self._on_stream(message)
            case RouterHeartbeat():
                self._on_heartbeat(message)
            case RouterWelcome():
                self._on_welcome(message)
            case _:
                assert_never(message)

    def _on_failed(self, failed: RouterFailed) -> None:
        """The router does not know us (it restarted, or lost us and cancelled our requests): begin anew."""
        _logger.warning(log.FRAME_REJECTED, address=self.address, code=failed.code, detail=failed.detail)
        if self.joined:
            self.lose("refused")
            self._reconnect()

    def _on_stream(self, stream: Stream) -> None:
        now = self.seen_at
        for output in stream.outputs:
            mailbox = self.mailboxes.get(output.request_id)
            if mailbox is None:
                # Left over from before a loss, or its cancellation got lost: it must not run on for nobody.
                if output.ended is None:
                    self.cancel(output.request_id)
                continue
            ended = output.ended
            if ended is not None and ended.code == Draining.code and not mailbox.is_cancelled:
                del self.mailboxes[output.request_id]
                self.num_engines = 0  # it stops: nothing is sent there until it says that it serves again
                self._on_lost([mailbox], Draining(ended.detail, retry_after_s=ended.retry_after_s))
                continue
            mailbox.revision = self.revision
            if mailbox.adapter in self.adapters:
                mailbox.adapter_revision = self.adapters[mailbox.adapter]
            mailbox.deliver(output, now)
            if mailbox.over:
                del self.mailboxes[output.request_id]
        credits_to_give = self._meter.consumed()
        if credits_to_give:
            self.send(StreamCredit(credits_to_give))

    def _on_welcome(self, welcome: RouterWelcome) -> None:
        if self.joined and self.router_incarnation != welcome.incarnation:
            self.lose("restarted")
        if not self.joined:
            _logger.info(
                log.ROUTER_JOINED,
                router_id=welcome.router_id,
                address=self.address,
                model=welcome.model,
                num_engines=welcome.num_engines,
            )
        self.router_id = welcome.router_id
        self.router_incarnation = welcome.incarnation
        self.is_paced = welcome.paced
        self._set_model(welcome)

    def _on_heartbeat(self, heartbeat: RouterHeartbeat) -> None:
        if not self.joined:
            return
        if heartbeat.incarnation != self.router_incarnation:
            self.lose("restarted")
            self._hello()
            return
        self.num_requests = heartbeat.num_requests
        self.max_requests = heartbeat.max_requests
        self.engines_load = EnginesLoad(heartbeat.num_running, heartbeat.num_waiting, heartbeat.kv_usage)
        self._set_model(heartbeat)

    def _set_model(self, message: RouterWelcome | RouterHeartbeat) -> None:
        self.num_engines = message.num_engines
        self.model = message.model
        self.adapters = {adapter.name: adapter.revision for adapter in message.adapters}
        self.known_adapters.update(self.adapters)
        # Without engines it knows no limits: what it said before, in this life or another, is still true.
        if not message.model or message.max_model_len <= 0 or message.vocab_size <= 0:
            return
        self.revision = message.revision
        self.limits = ModelLimits(
            max_model_len=message.max_model_len,
            vocab_size=message.vocab_size,
            eos_token_ids=frozenset(message.eos_token_ids),
        )

    def status(self) -> dict[str, Any]:
        """For people and ``/ready``."""
        return {
            "address": self.address,
            "router_id": self.router_id,
            "alive": self.joined,
            "model": self.model,
            "num_engines": self.num_engines,
            "num_requests": self.num_requests,
            "max_requests": self.max_requests,
            "num_own_requests": len(self.mailboxes),
        }
