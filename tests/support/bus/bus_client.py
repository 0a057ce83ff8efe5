"""A gateway without HTTP: sends token ids to a router and collects token ids, checking every offset."""

from __future__ import annotations

import asyncio
import itertools
import secrets
from dataclasses import dataclass, field

from microserve.protocol.bus.codec import ROUTER_REPLY, ROUTER_REQUEST, encode_tokens
from microserve.protocol.bus.credit import CreditMeter
from microserve.protocol.bus.transport import Bus
from microserve.protocol.messages import router as serving
from microserve.protocol.messages.engine import TokenLogprob
from microserve.protocol.messages.sampling import SamplingParams

PING_INTERVAL_S = 0.5


@dataclass
class Answer:
    request_id: str
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    ended: serving.Ended | None = None
    done: asyncio.Event = field(default_factory=asyncio.Event)
    grown: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def reason(self) -> str:
        return self.ended.reason if self.ended else ""


class BusClient:
    """One connection to one router. Use as an async context manager."""

    def __init__(self, bus: Bus, address: str, *, credit: int = 64) -> None:
        self._incarnation = secrets.randbits(62) | 1
        self._id = f"test-{secrets.token_hex(4)}"
        self._meter = CreditMeter(credit)
        self._credit = credit
        self._ids = itertools.count()
        self._answers: dict[str, Answer] = {}
        self._welcomed = asyncio.Event()
        self.welcome: serving.RouterWelcome | None = None
        self.num_engines = 0
        self.max_model_len = 0
        self._changed = asyncio.Event()
        self._socket = bus.client(address, self._receive)
        self._pinging: asyncio.Task[None] | None = None

    async def __aenter__(self) -> BusClient:
        hello = serving.GatewayHello(self._id, self._incarnation, self._credit)
        self._socket.send(ROUTER_REQUEST.encode(hello))
        async with asyncio.timeout(30):
            await self._welcomed.wait()
        self._pinging = asyncio.create_task(self._ping())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._pinging is not None:
            self._pinging.cancel()
        self._socket.close()

    async def _ping(self) -> None:
        while True:
            self._socket.send(ROUTER_REQUEST.encode(serving.GatewayPing(self._incarnation)))
            await asyncio.sleep(PING_INTERVAL_S)

    async def wait_engines(self, count: int, timeout_s: float = 60.0) -> None:
        """Until the router knows at least so many engines."""
        async with asyncio.timeout(timeout_s):
            while self.num_engines < count:
                self._changed.clear()
                await self._changed.wait()

    def _receive(self, frames: list[bytes]) -> None:
        message, _ = ROUTER_REPLY.decode(frames)
        match message:
            case serving.RouterWelcome():
                self.welcome = message
                self.num_engines = message.num_engines
                self.max_model_len = message.max_model_len
                self._welcomed.set()
            case serving.RouterHeartbeat():
                self.num_engines = message.num_engines
                self.max_model_len = message.max_model_len
                self._changed.set()
            case serving.Stream():
                give = self._meter.consumed()
                if give:
                    self._socket.send(ROUTER_REQUEST.encode(serving.StreamCredit(give)))
                for output in message.outputs:
                    self._take(output)

    def _take(self, output: serving.Output) -> None:
        answer = self._answers.get(output.request_id)
        if answer is None:
            return
        have = len(answer.token_ids)
        assert output.offset <= have, f"gap: offset {output.offset}, have {have}"
        fresh = output.token_ids[have - output.offset :]
        answer.token_ids.extend(fresh)
        answer.logprobs.extend(
            output.logprobs[len(output.logprobs) - len(fresh) :] if output.logprobs else []
        )
        answer.grown.set()
        if output.ended is not None:
            assert answer.ended is None, "two ends"
            answer.ended = output.ended
            answer.done.set()

    def start(
        self,
        prompt: list[int],
        params: SamplingParams,
        *,
        strategy: str | None = None,
        ttl_s: float = 300.0,
        salt: str = "",
        request_id: str | None = None,
    ) -> Answer:
        request_id = request_id or f"{self._id}-{next(self._ids)}"
        answer = self._answers[request_id] = Answer(request_id)
        model = self.welcome.model if self.welcome else ""
        message = serving.Generate(request_id, model, params, ttl_s, strategy, salt)
        self._socket.send(ROUTER_REQUEST.encode(message, encode_tokens(prompt)))
        return answer

    def cancel(self, answer: Answer) -> None:
        self._socket.send(ROUTER_REQUEST.encode(serving.Cancel(answer.request_id)))

    async def generate(
        self,
        prompt: list[int],
        params: SamplingParams,
        *,
        strategy: str | None = None,
        ttl_s: float = 300.0,
        salt: str = "",
    ) -> Answer:
        answer = self.start(prompt, params, strategy=strategy, ttl_s=ttl_s, salt=salt)
        async with asyncio.timeout(ttl_s + 30.0):
            await answer.done.wait()
        return answer
