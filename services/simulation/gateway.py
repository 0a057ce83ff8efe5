"""A gateway without HTTP, in a simulated process: requests in, token ids out, a stream's promises checked.

Owns the connections to the routers and what became of each request. Behaves towards routers as the real
gateway does (hello, pings, credit; requests of a router that is lost, or that stops, go on at another one);
says what a client would have seen.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from microserve.protocol.bus.codec import ROUTER_REPLY, ROUTER_REQUEST, encode_tokens
from microserve.protocol.bus.credit import CreditMeter
from microserve.protocol.bus.numbered import NumberedClient
from microserve.protocol.bus.transport import Bus
from microserve.protocol.errors import Draining
from microserve.protocol.messages import router as serving
from microserve.protocol.messages.engine import TokenLogprob
from microserve.protocol.messages.sampling import SamplingParams
from microserve.protocol.settings import BusSettings

MOVE_PATIENCE_S = 3.0
"""A request waits so long for another router."""


@dataclass
class Answer:
    """One request as its client sees it."""

    request_id: str
    prompt: list[int]
    params: SamplingParams
    submitted_at: float
    """World time."""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    outcome: str = ""
    """Empty until there is one: ``stop``, ``length``, ``abort``, an error's code, or ``router_lost``."""
    detail: str = ""
    first_token_at: float = 0.0
    """World time; 0 until there is a token."""
    ended_at: float = 0.0
    ended: serving.Ended | None = None
    """What the router said at the end."""
    is_cancelled: bool = False
    strategy: str = ""
    salt: str = ""
    deadline: float = 0.0
    """World time."""
    num_moves: int = 0
    """Routers that were lost under it."""

    @property
    def is_complete(self) -> bool:
        return self.outcome in ("stop", "length")


class SimGateway:
    """One gateway process: a link to every router."""

    def __init__(
        self,
        bus: Bus,
        gateway_id: str,
        incarnation: int,
        settings: BusSettings,
        *,
        world_time: Callable[[], float],
    ) -> None:
        self.answers: dict[str, Answer] = {}
        self.violations: list[str] = []
        self.world_time = world_time
        self._links: dict[str, Link] = {}
        self._homeless: dict[str, tuple[Answer, float, str]] = {}
        self._bus = bus
        self._settings = settings
        self._identity = (gateway_id, incarnation)

    async def run(self, routers: list[str]) -> None:
        for address in routers:
            self._links[address] = Link(self, self._bus, address, *self._identity, self._settings)
        try:
            while True:
                for link in self._links.values():
                    link.tick()
                self.place_homeless()
                await asyncio.sleep(self._settings.heartbeat_interval_s)
        finally:
            for link in self._links.values():
                link.close()

    @property
    def num_usable(self) -> int:
        """Routers that have welcomed this gateway and have told it of engines."""
        return sum(link.is_usable for link in self._links.values())

    def submit(self, answer: Answer, address: str, *, ttl_s: float) -> None:
        """Send it to the router at ``address``, or to another one that is there."""
        self.answers[answer.request_id] = answer
        answer.deadline = self.world_time() + ttl_s
        links = [link for link in self._links.values() if link.is_usable]
        chosen = [link for link in links if link.address == address] or links
        if not chosen:
            self.end(answer, "no_router", "no router with an engine answers")
            return
        chosen[0].submit(answer)

    def move(self, answer: Answer, why: str) -> None:
        """Its router is lost or stops: it goes on at another one, from what the client has."""
        if answer.is_cancelled:
            self.end(answer, "router_lost", why)
            return
        answer.num_moves += 1
        self._homeless[answer.request_id] = (answer, self.world_time(), why)
        self.place_homeless()

    def place_homeless(self) -> None:
        """Requests without a router: to the next best one, but not for ever."""
        now = self.world_time()
        for answer, since, why in list(self._homeless.values()):
            links = [link for link in self._links.values() if link.is_usable]
            if answer.outcome or links or now - since > MOVE_PATIENCE_S:
                del self._homeless[answer.request_id]
            if not answer.outcome and links:
                min(links, key=lambda link: link.num_requests).submit(answer)
            elif not answer.outcome and now - since > MOVE_PATIENCE_S:
                self.end(answer, "router_lost", why)

    def cancel(self, answer: Answer) -> None:
        answer.is_cancelled = True
        for link in self._links.values():
            link.cancel(answer)

    def end(self, answer: Answer, outcome: str, detail: str = "") -> None:
        if answer.outcome:
            self.violations.append(f"{answer.request_id} ended twice: {answer.outcome}, {outcome}")
            return
        answer.outcome, answer.detail, answer.ended_at = outcome, detail, self.world_time()


class Link:
    """One router as this gateway knows it."""

    def __init__(
        self,
        gateway: SimGateway,
        bus: Bus,
        address: str,
        gateway_id: str,
        incarnation: int,
        settings: BusSettings,
    ) -> None:
        self.address = address
        self.is_joined = False
        self._gateway = gateway
        self._bus = bus
        self._gateway_id = gateway_id
        self._incarnation = incarnation
        self._credit = settings.credit
        self._silence_s = settings.heartbeat_interval_s * settings.liveness
        self._meter = CreditMeter(self._credit)
        self._loop = asyncio.get_running_loop()
        self._heard_at = self._loop.time()
        self._ticked_at = self._heard_at
        self._router_incarnation = 0
        self._num_engines = 0
        self._requests: dict[str, Answer] = {}
        self._socket: NumberedClient | None = None
        self._connect()

    def _connect(self) -> None:
        if self._socket is not None:
            self._socket.close()
        self._heard_at = self._loop.time()
        self._meter = CreditMeter(self._credit)
        self._socket = NumberedClient(
            self._bus,
            self.address,
            self._receive,
            lambda detail: self._lose(f"messages were lost: {detail}"),
            on_disconnect=lambda: self._lose("the router closed the connection"),
        )
        self._send(serving.GatewayHello(self._gateway_id, self._incarnation, self._credit))

    def _send(self, message: serving.RouterRequest, *bulk: bytes) -> None:
        if self._socket is not None:
            self._socket.send(ROUTER_REQUEST.encode(message, *bulk))

    def tick(self) -> None:
        now = self._loop.time()
        stalled, self._ticked_at = now - self._ticked_at > self._silence_s / 2, now
        if stalled:  # who did not listen cannot say that the other was silent
            self._heard_at = now
        elif now - self._heard_at > self._silence_s:
            self._lose("the router fell silent")
        elif self.is_joined:
            self._send(serving.GatewayPing(self._incarnation))

    def _lose(self, why: str) -> None:
        self.is_joined = False
        requests, self._requests = self._requests, {}
        self._connect()
        for answer in requests.values():
            self._gateway.move(answer, why)

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    @property
    def is_usable(self) -> bool:
        return self.is_joined and self._num_engines > 0

    @property
    def num_requests(self) -> int:
        return len(self._requests)

    def submit(self, answer: Answer) -> None:
        wire_id = f"{answer.request_id}~{answer.num_moves}"
        self._requests[wire_id] = answer
        message = serving.Generate(
            wire_id,
            "",
            answer.params,
            answer.deadline - self._gateway.world_time(),
            answer.strategy,
            answer.salt,
            len(answer.token_ids),
        )
        self._send(message, encode_tokens([*answer.prompt, *answer.token_ids]))

    def cancel(self, answer: Answer) -> None:
        wire_id = f"{answer.request_id}~{answer.num_moves}"
        if self._requests.get(wire_id) is answer:
            self._send(serving.Cancel(wire_id))

    def _receive(self, frames: list[bytes]) -> None:
        message, _ = ROUTER_REPLY.decode(frames)
        self._heard_at = self._loop.time()
        match message:
            case serving.RouterWelcome():
                if self.is_joined and message.incarnation != self._router_incarnation:
                    self._lose("the router restarted")
                    return
                self._router_incarnation = message.incarnation
                self.is_joined = True
                self._num_engines = message.num_engines
                self._gateway.place_homeless()
            case serving.RouterHeartbeat():
                self._num_engines = message.num_engines
                if self.is_joined and message.incarnation != self._router_incarnation:
                    self._lose("the router restarted")
            case serving.RouterFailed():
                if self.is_joined:
                    self._lose(f"the router refused: {message.detail}")
            case serving.Stream():
                credit = self._meter.consumed()
                if credit:
                    self._send(serving.StreamCredit(credit))
                for output in message.outputs:
                    self._take(output)

    def _take(self, output: serving.Output) -> None:
        answer = self._requests.get(output.request_id)
        if answer is None:
            return
        have = len(answer.token_ids)
        if output.offset != have:
            self._gateway.violations.append(
                f"{answer.request_id}: tokens from {output.offset} on, {have} are here"
            )
            return
        if output.token_ids and not have:
            answer.first_token_at = self._gateway.world_time()
        answer.token_ids += output.token_ids
        answer.logprobs += output.logprobs
        if output.ended is not None:
            del self._requests[output.request_id]
            ended = output.ended
            if ended.code == Draining.code:
                self._gateway.move(answer, ended.detail)
                return
            answer.ended = ended
            self._gateway.end(answer, ended.code or ended.reason, ended.detail)
