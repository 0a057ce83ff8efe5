"""The router's door for gateways: hellos, requests in, one ``Stream`` a wake-up out, liveness.

Owns the ROUTER socket and what is known of each gateway. A gateway owns its requests and has one connection
here: when it falls silent, comes back as a new life or by a new connection, or cannot be sent to, and when
messages were lost, they are cancelled and it is told so. No frame can end the service.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable
from typing import assert_never

import structlog

from microserve.protocol import log
from microserve.protocol.bus.codec import ROUTER_REPLY, ROUTER_REQUEST
from microserve.protocol.bus.credit import CreditWindow
from microserve.protocol.bus.numbered import NumberedServer
from microserve.protocol.bus.peers import Peer, Peers
from microserve.protocol.bus.queue import StreamQueue
from microserve.protocol.bus.transport import Bus
from microserve.protocol.errors import MeshError, NotPermitted, ProtocolViolation
from microserve.protocol.messages import router as wire
from microserve.protocol.messages.engine import TokenLogprob
from microserve.protocol.messages.numerics import Numerics
from microserve.protocol.messages.request.prompt_logprobs import PromptLogprobs
from microserve.protocol.process.pace import Pace
from microserve.protocol.process.surviving import surviving
from microserve.protocol.process.tick import at_rest, tick
from microserve.protocol.security import rights
from microserve.protocol.security.rights import Entrance
from microserve.protocol.settings.settings import BusSettings
from microserve.protocol.types import MAX_REQUEST_ID_CHARS, MAX_URL_CHARS
from microserve.services.router.serving.serving import Serving

LOG_INTERVAL_S = 1.0
"""``frame.rejected`` is written at most this often, with the count so far."""

MAX_URLS = 64
"""Of gateways that are told of."""

_logger = structlog.get_logger()


class Outbox(StreamQueue[wire.Output, wire.Ended]):
    """Of one gateway. What an answer's class is, and who serves it, goes out with the tokens that it came
    with."""

    def __init__(self, credit: int, url: str = "") -> None:
        super().__init__(self._output, credit)
        self.url = url if len(url) <= MAX_URL_CHARS and url.isascii() and url.isprintable() else ""
        self._numerics: dict[str, Numerics] = {}
        self._served: dict[str, wire.Served] = {}

    def emit(self, output: wire.Output) -> None:
        self.add(
            *(output.request_id, output.offset, output.token_ids, output.logprobs, output.ended, output),
            prompt=output.prompt,
        )

    def _join(self, output: wire.Output) -> None:
        if output.numerics is not None:
            self._numerics[output.request_id] = output.numerics
        if output.served is not None:
            self._served[output.request_id] = output.served

    def _output(
        self,
        request_id: str,
        offset: int,
        token_ids: list[int],
        logprobs: list[TokenLogprob],
        ended: wire.Ended | None,
        /,
        *,
        prompt: PromptLogprobs | None = None,
    ) -> wire.Output:
        numerics = self._numerics.pop(request_id, None) if self._numerics else None
        served = self._served.pop(request_id, None) if self._served else None
        return wire.Output(request_id, offset, token_ids, logprobs, ended, numerics, served, prompt)


Gateway = Peer[bytes, Outbox]
"""By routing id."""


class Gateways:
    def __init__(
        self,
        bus: Bus,
        address: str,
        serving: Serving,
        settings: BusSettings,
        pace: Pace,
        *,
        welcome: Callable[[], wire.RouterWelcome],
        heartbeat: Callable[[float], wire.RouterHeartbeat],
    ) -> None:
        """``heartbeat`` is given its ``next_s``.

        Raises ``OSError`` when the address is taken, ``ConfigError`` when it is exposed without keys."""
        self.num_rejected = 0
        """Messages that were against WIRE.md."""
        self._serving = serving
        self._welcome = welcome
        self._heartbeat = heartbeat
        self._interval_s = settings.heartbeat_interval_s
        self._rest_interval_s = at_rest(self._interval_s, settings.liveness)
        self._pace = pace
        self._loop = asyncio.get_running_loop()
        self._context = contextvars.copy_context()
        self._gateways: Peers[bytes, Outbox] = Peers(
            interval_s=self._rest_interval_s,
            silence_s=self._interval_s * settings.liveness,
        )
        self._waiting: dict[Gateway, None] = {}
        """Gateways that have something to be sent, in the order of its coming: a set's would be by chance."""
        self._flush_scheduled = False
        self._logged_at = float("-inf")
        self._socket = NumberedServer(bus, address, self.receive, self._take_loss, Entrance.ROUTER)

    def __len__(self) -> int:
        return len(self._gateways)

    @property
    def address(self) -> str:
        return self._socket.address

    @property
    def are_idle(self) -> bool:
        """So they say."""
        return self._gateways.are_idle

    @property
    def urls(self) -> list[str]:
        """Where they serve HTTP, as they say; workers of one gateway say the same."""
        said = sorted({gateway.value.url for gateway in self._gateways} - {""})
        return said[:MAX_URLS]

    async def run(self) -> None:
        """Heartbeats and the end of the silent, until cancelled."""
        while True:
            next_s = self._pace.next_s
            for gateway, _ in self._gateways.expire(self._loop.time(), next_s):
                with surviving("end of a silent gateway", gateway_id=gateway.name):
                    self._end(gateway, "silent")
                    # Should only one direction be dead, the gateway learns it before it misses us.
                    self._tell(gateway.key, ProtocolViolation("you were silent; say GatewayHello first"))
            for gateway in self._gateways:
                with surviving("heartbeat", gateway_id=gateway.name):
                    self._send(gateway, self._heartbeat(next_s))
            if len(self._serving):
                await tick(self._interval_s)
            else:
                await self._pace.tick(next_s, self._rest_interval_s)

    def close(self) -> None:
        """Send what credit allows and close."""
        self._flush()
        self._socket.close()

    # --- in ----------------------------------------------------------------------------------------

    def receive(self, peer: bytes, frames: list[bytes]) -> None:
        """One message of a peer. Never raises for anything that a peer can send."""
        try:
            message, bulk = ROUTER_REQUEST.decode(frames)
            rights.check(self._socket.sender_roles, type(message))
            self._handle(peer, message, bulk)
        except (ProtocolViolation, NotPermitted) as violation:
            self._reject(peer, violation)

    def _handle(self, peer: bytes, message: wire.RouterRequest, bulk: list[bytes]) -> None:
        expected = 1 if isinstance(message, wire.Generate) else 0
        if len(bulk) != expected:
            raise ProtocolViolation(f"{type(message).__name__} with {len(bulk)} bulk frames, not {expected}")
        if isinstance(message, wire.GatewayHello):
            self._hello(peer, message)
            return
        next_s = message.next_s if isinstance(message, wire.GatewayPing) else 0.0
        if not next_s:
            self._pace.stir()
        gateway = self._gateways.heard(peer, self._loop.time(), next_s=next_s)
        if gateway is None:
            raise ProtocolViolation("say GatewayHello first")
        match message:
            case wire.Generate():
                _check_id("request_id", message.request_id)
                if len(message.tenant) > MAX_REQUEST_ID_CHARS:
                    raise ProtocolViolation(f"tenant has {len(message.tenant)} characters")
                self._serving.submit(peer, message, bulk[0], lambda output: self._emit(gateway, output))
            case wire.Cancel():
                self._serving.cancel(peer, message.request_id)
            case wire.GatewayPing():
                if message.incarnation != gateway.incarnation:
                    raise ProtocolViolation("ping of another incarnation; say GatewayHello first")
            case wire.StreamCredit():
                gateway.value.window.grant(message.messages)
                self._schedule(gateway)
            case _:  # a message without its case would be dropped, and its sender wait for nothing
                assert_never(message)

    def _hello(self, peer: bytes, message: wire.GatewayHello) -> None:
        _check_id("gateway_id", message.gateway_id)
        self._pace.stir()
        if not self._socket.send(peer, ROUTER_REPLY.encode(self._welcome())):
            return  # a router that thaws reads old hellos: one of a closed socket must replace nobody
        outbox = Outbox(message.credit, message.url)
        gateway, replaced = self._gateways.join(
            peer, message.gateway_id, message.incarnation, outbox, self._loop.time()
        )
        for other in replaced:
            self._end(other, "replaced")
        if gateway.value is outbox:
            _logger.info(log.GATEWAY_JOINED, gateway_id=message.gateway_id, incarnation=message.incarnation)
        # A gateway that says hello again counts from its full window, and so do we.
        gateway.value.window = CreditWindow(message.credit)
        self._schedule(gateway)

    def _take_loss(self, peer: bytes) -> None:
        gateway = self._gateways.remove(peer)
        if gateway is not None:
            self._end(gateway, "messages were lost")

    def _reject(self, peer: bytes, violation: MeshError) -> None:
        self.num_rejected += 1
        now = self._loop.time()
        if now - self._logged_at >= LOG_INTERVAL_S:
            self._logged_at = now
            _logger.warning(log.FRAME_REJECTED, error=violation.detail, rejected=self.num_rejected)
        self._tell(peer, violation)

    def _tell(self, peer: bytes, violation: MeshError) -> None:
        self._socket.send(peer, ROUTER_REPLY.encode(wire.RouterFailed(violation.code, violation.detail)))

    # --- out ---------------------------------------------------------------------------------------

    def _emit(self, gateway: Gateway, output: wire.Output) -> None:
        if self._gateways.find(gateway.key) is gateway:
            gateway.value.emit(output)
            self._schedule(gateway)

    def _schedule(self, gateway: Gateway) -> None:
        """Everything that this turn of the loop brings goes out in one message a gateway."""
        self._waiting[gateway] = None
        if not self._flush_scheduled:
            self._flush_scheduled = True
            self._loop.call_soon(self._flush, context=self._context)

    def _flush(self) -> None:
        self._flush_scheduled = False
        waiting, self._waiting = self._waiting, {}
        for gateway in waiting:
            while outputs := gateway.value.take():
                if not self._send(gateway, wire.Stream(outputs)):
                    break

    def _send(self, gateway: Gateway, message: wire.RouterReply) -> bool:
        """False, and the gateway is lost, when it is gone or takes nothing."""
        if self._socket.send(gateway.key, ROUTER_REPLY.encode(message)):
            return True
        if self._gateways.find(gateway.key) is gateway:
            self._gateways.remove(gateway.key)
            self._end(gateway, "unreachable")
        return False

    def _end(self, gateway: Gateway, why: str) -> None:
        """Of one that is in the table no more."""
        self._waiting.pop(gateway, None)
        cancelled = self._serving.cancel_owner(gateway.key)
        _logger.warning(log.GATEWAY_LOST, gateway_id=gateway.name, reason=why, requests=cancelled)


def _check_id(field: str, value: str) -> None:
    """An id is a key here and is echoed in answers, so it must be one that can be."""
    if not 0 < len(value) <= MAX_REQUEST_ID_CHARS:
        raise ProtocolViolation(f"{field} has {len(value)} characters, not 1 to {MAX_REQUEST_ID_CHARS}")
