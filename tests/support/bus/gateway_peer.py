"""A gateway without HTTP: sends token ids to a router and collects token ids; a gap or a second end fails."""

from __future__ import annotations

import asyncio
import itertools
import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from microserve.protocol.bus import codec
from microserve.protocol.bus.transport import Bus
from microserve.protocol.messages import router as serving
from microserve.protocol.messages.engine import TokenLogprob
from microserve.protocol.messages.numerics import UNKNOWN, Numerics
from microserve.protocol.messages.request.prompt_logprobs import PromptLogprobs
from microserve.protocol.messages.request.sampling import SamplingParams


@dataclass
class Answer:
    """What a gateway has got of one request."""

    request_id: str
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    rows: PromptLogprobs | None = None
    """Of its prompt; joining says where one is missing or comes twice."""
    num_outputs: int = 0
    numerics: list[Numerics] = field(default_factory=list)
    """All that it was told of its class, in order."""
    ended: serving.Ended | None = None
    done: asyncio.Event = field(default_factory=asyncio.Event)
    grown: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def result(self) -> serving.Ended:
        assert self.ended is not None
        return self.ended

    @property
    def reason(self) -> str:
        return self.ended.reason if self.ended else ""

    async def wait(self, timeout_s: float = 15.0) -> serving.Ended:
        async with asyncio.timeout(timeout_s):
            await self.done.wait()
        return self.result

    async def tokens(self, count: int) -> None:
        async with asyncio.timeout(15):
            while len(self.token_ids) < count:
                self.grown.clear()
                await self.grown.wait()


class GatewayPeer:
    """One connection to one router, in the hands of the test: every message that came is kept."""

    _numbers = itertools.count()

    def __init__(
        self,
        bus: Bus,
        address: str,
        *,
        credit: int = 64,
        incarnation: int = 1,
        auto_credit: bool = True,
        gateway_id: str | None = None,
        ping_interval_s: float = 0.05,
        ttl_s: float = 30.0,
    ) -> None:
        self.gateway_id = gateway_id or f"gateway-{next(self._numbers)}"
        self.incarnation = incarnation
        self.streams: list[serving.Stream] = []
        self.welcomes: list[serving.RouterWelcome] = []
        self.heartbeats: list[serving.RouterHeartbeat] = []
        self.failures: list[serving.RouterFailed] = []
        self.answers: dict[str, Answer] = {}
        self.auto_credit = auto_credit
        self._credit = credit
        self._ping_interval_s = ping_interval_s
        self._ttl_s = ttl_s
        self._ids = itertools.count()
        self._socket = bus.client(address, self._receive)
        self._pinging = asyncio.create_task(self._ping())
        self.hello()

    def hello(self) -> None:
        self.send(serving.GatewayHello(self.gateway_id, self.incarnation, self._credit))

    def send(self, message: serving.RouterRequest, *bulk: bytes) -> None:
        self._socket.send(codec.ROUTER_REQUEST.encode(message, *bulk))

    def send_frames(self, frames: Sequence[bytes]) -> None:
        self._socket.send(frames)

    def start(
        self,
        prompt: Sequence[int],
        params: SamplingParams | None = None,
        *,
        strategy: str | None = None,
        request_id: str | None = None,
        ttl_s: float | None = None,
        model: str = "",
        salt: str = "",
        output: Sequence[int] = (),
        revision: str = "",
        numerics: Numerics = UNKNOWN,
        tenant: str = "",
        priority: int = 0,
        attributes: Mapping[str, str] | None = None,
        adapter: str = "",
        adapter_revision: str = "",
        exact: bool | None = None,
        **sampling: Any,
    ) -> Answer:
        """``output``: what another router has delivered before, of the model ``revision`` in the class
        ``numerics``; ``sampling``: in place of ``params``."""
        answer = Answer(request_id or f"{self.gateway_id}-{next(self._ids)}", list(output))
        self.answers[answer.request_id] = answer
        if params is None:
            params = SamplingParams(**({"max_tokens": 4} | sampling))
        message = serving.Generate(
            answer.request_id,
            model,
            params,
            self._ttl_s if ttl_s is None else ttl_s,
            strategy,
            salt,
            num_output_tokens=len(output),
            tenant=tenant,
            priority=priority,
            attributes=dict(attributes or {}),
            revision=revision,
            numerics=numerics,
            adapter=adapter,
            adapter_revision=adapter_revision,
            exact=exact,
        )
        self.send(message, codec.encode_tokens([*prompt, *output]))
        return answer

    def expect(self, request_id: str, num_tokens: int) -> Answer:
        """An answer to what the test sends itself, and that begins behind ``num_tokens``."""
        answer = self.answers[request_id] = Answer(request_id, [0] * num_tokens)
        return answer

    async def generate(
        self,
        prompt: Sequence[int],
        params: SamplingParams | None = None,
        *,
        ttl_s: float | None = None,
        **fields: Any,
    ) -> Answer:
        """Half a minute longer than it may take: the router ends it by then."""
        answer = self.start(prompt, params, ttl_s=ttl_s, **fields)
        allowed_s = ttl_s if ttl_s is not None and math.isfinite(ttl_s) else self._ttl_s
        await answer.wait(allowed_s + 30.0)
        return answer

    def cancel(self, answer: Answer) -> None:
        self.send(serving.Cancel(answer.request_id))

    def fall_silent(self) -> None:
        self._pinging.cancel()

    def close(self) -> None:
        self._pinging.cancel()
        self._socket.close()

    async def _ping(self) -> None:
        while True:
            await asyncio.sleep(self._ping_interval_s)
            self.send(serving.GatewayPing(self.incarnation))

    def _receive(self, frames: list[bytes]) -> None:
        message, _ = codec.ROUTER_REPLY.decode(frames)
        match message:
            case serving.RouterWelcome():
                self.welcomes.append(message)
            case serving.RouterHeartbeat():
                self.heartbeats.append(message)
            case serving.RouterFailed():
                self.failures.append(message)
            case serving.Stream():
                self.streams.append(message)
                if self.auto_credit:
                    self.send(serving.StreamCredit(1))
                for output in message.outputs:
                    self._take(output)

    def _take(self, output: serving.Output) -> None:
        answer = self.answers[output.request_id]
        assert answer.ended is None, "output after the end"
        assert output.offset == len(answer.token_ids), "outputs follow each other"
        answer.token_ids += output.token_ids
        answer.logprobs += output.logprobs or []
        if output.prompt is not None:
            assert not answer.token_ids or output.token_ids, "the prompt's rows come before tokens"
            answer.rows = output.prompt if answer.rows is None else answer.rows.joined(output.prompt)
        answer.num_outputs += 1
        if output.numerics is not None:
            answer.numerics.append(output.numerics)
        answer.grown.set()
        if output.ended is not None:
            answer.ended = output.ended
            answer.done.set()


class BusClient(GatewayPeer):
    """The same for hours, against processes: keeps the last message of a kind. An async context manager."""

    def __init__(self, bus: Bus, address: str) -> None:
        self._came = asyncio.Event()
        super().__init__(
            bus,
            address,
            incarnation=secrets.randbits(62) | 1,
            gateway_id=f"test-{secrets.token_hex(4)}",
            ping_interval_s=0.5,
            ttl_s=300.0,
        )

    @property
    def num_engines(self) -> int:
        return self.heartbeats[-1].num_engines if self.heartbeats else self.welcomes[-1].num_engines

    async def __aenter__(self) -> BusClient:
        await self._until(lambda: bool(self.welcomes), 30.0)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    async def wait_engines(self, count: int, timeout_s: float = 60.0) -> None:
        """Until the router knows at least so many engines."""
        await self._until(lambda: self.num_engines >= count, timeout_s)

    async def _until(self, condition: Callable[[], bool], timeout_s: float) -> None:
        async with asyncio.timeout(timeout_s):
            while not condition():
                self._came.clear()
                await self._came.wait()

    def _receive(self, frames: list[bytes]) -> None:
        super()._receive(frames)
        for kept in (self.streams, self.welcomes, self.heartbeats, self.failures):
            del kept[:-1]
        self._came.set()
