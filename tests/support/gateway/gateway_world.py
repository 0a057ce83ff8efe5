"""A gateway served in the test's loop, and the router at its other end: a real socket, played by the test."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import uvloop
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from microserve.protocol.bus.codec import ROUTER_REPLY, ROUTER_REQUEST, decode_tokens
from microserve.protocol.bus.credit import CreditWindow
from microserve.protocol.bus.curve import CurveKeys
from microserve.protocol.bus.numbered import NumberedServer
from microserve.protocol.bus.transport import ZmqBus
from microserve.protocol.messages.engine import Usage
from microserve.protocol.messages.router import (
    Cancel,
    Ended,
    GatewayHello,
    GatewayPing,
    Generate,
    Output,
    Phases,
    RouterFailed,
    RouterHeartbeat,
    RouterReply,
    RouterWelcome,
    Stream,
    StreamCredit,
)
from microserve.protocol.process.lifecycle import Lifecycle
from tests.support.bus.lossy_bus import LossyBus
from tests.support.gateway.served import serve_with

T = TypeVar("T")
TIMEOUT_S = 30.0
BEAT_S = 0.05
QUICK_LOSS = "bus.liveness=16"
"""Setting for tests of silence; elsewhere a busy machine must not look like a lost router."""
MAX_MODEL_LEN = 512

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = ["the quick brown fox jumps over the lazy dog", "Hello world, how are you today?", "user assistant"]


def make_tokenizer() -> Tokenizer:
    """A byte-level tokenizer: any text, its characters cut anywhere between bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True) for text in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    )
    return tokenizer


def special_id(tokenizer: Tokenizer, token: str) -> int:
    token_id = tokenizer.token_to_id(token)
    assert token_id is not None
    return token_id


def make_model(directory: Path) -> Path:
    """What the gateway needs of a model's directory."""
    directory.mkdir(parents=True, exist_ok=True)
    make_tokenizer().save(str(directory / "tokenizer.json"))
    config = {"eos_token": {"content": "<|im_end|>"}, "bos_token": "<|im_start|>", "chat_template": TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def run(main: Coroutine[Any, Any, T], *, timeout_s: float = TIMEOUT_S) -> T:
    """Run a test on the loop that the gateway runs on, with an end to every hang."""

    async def bounded() -> T:
        async with asyncio.timeout(timeout_s):
            return await main

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(bounded())


PHASES = Phases(
    total_s=0.0021,
    routed_s=0.0001,
    granted_s=0.0002,
    prefilled_s=0.0003,
    transferred_s=0.0004,
    admitted_s=0.0005,
    first_token_s=0.0006,
)


@dataclass
class Served:
    """One request at the router."""

    router: ScriptedRouter
    peer: bytes
    message: Generate
    tokens: list[int]
    sent: int = 0
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    over: bool = False

    def send(
        self,
        token_ids: Sequence[int] = (),
        *,
        offset: int | None = None,
        ended: Ended | None = None,
        **fields: Any,
    ) -> None:
        """Stream tokens, and perhaps the end; ``offset`` is right unless given; ``fields``: of ``Output``."""
        at = self.sent if offset is None else offset
        self.sent = max(self.sent, at + len(token_ids))
        self.over = self.over or ended is not None
        output = Output(self.message.request_id, at, list(token_ids), ended=ended, **fields)
        self.router.stream(self.peer, output)

    def end(self, reason: str = "length", **details: Any) -> None:
        self.send(ended=self.ended(reason, **details))

    def ended(self, reason: str = "length", *, cached_tokens: int = 0, **details: Any) -> Ended:
        usage = Usage(len(self.tokens), cached_tokens, 0, self.sent)
        return Ended(reason, usage, PHASES, self.message.strategy or "auto", ["e0", "e1"], **details)


class ScriptedRouter:
    """Speaks the router's side of the wire; what it says to requests is the test's."""

    def __init__(
        self,
        bus: ZmqBus,
        *,
        model: str = "tiny",
        num_engines: int = 1,
        vocab_size: int = 1000,
        max_model_len: int = MAX_MODEL_LEN,
        eos_token_ids: Sequence[int] = (),
        adapters: Sequence[Any] = (),
        address: str = "tcp://127.0.0.1:0",
        confirm_cancels: bool = True,
        silent: bool = False,
    ) -> None:
        """``confirm_cancels``: answer every cancel by an end, as routers must."""
        self.model, self.num_engines = model, num_engines
        self.vocab_size, self.max_model_len = vocab_size, max_model_len
        self.eos_token_ids, self.revision, self.engines_load = list(eos_token_ids), "r1", (0, 0, 0.0)
        self.adapters, self.incarnation = list(adapters), secrets.randbits(62) | 1
        self.confirm_cancels = confirm_cancels
        self.silent = silent
        self.answer: Callable[[Served], None] | None = None
        """Called for every request; None: the test takes it by ``request``."""
        self.served: dict[str, Served] = {}
        self.cancels: list[str] = []
        self.num_hellos, self.url = 0, ""
        self.joined = asyncio.Event()
        """A ping came: the gateway has had our welcome."""
        self.windows: dict[bytes, CreditWindow] = {}
        self._beaten = asyncio.Event()
        self._backlog: list[tuple[bytes, Output]] = []
        self._requests: asyncio.Queue[Served] = asyncio.Queue()
        self.lossy = LossyBus(bus)
        self._socket = NumberedServer(self.lossy, address, self._on_frames, lambda peer: None)
        self.address = self._socket.address
        self._task = asyncio.get_running_loop().create_task(self._beat())

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._socket.close()

    async def next_beat(self) -> None:
        """Until the next heartbeat has been sent."""
        await self._beaten.wait()

    async def request(self) -> Served:
        return await self._requests.get()

    def _reply(self, peer: bytes, message: RouterReply) -> bool:
        return self._socket.send(peer, ROUTER_REPLY.encode(message))

    def send_raw(self, peer: bytes, frames: Sequence[bytes]) -> None:
        """As they are, without a number."""
        self._socket._socket.send(peer, frames)

    def stream(self, peer: bytes, output: Output) -> None:
        self._backlog.append((peer, output))
        self._flush()

    def _flush(self) -> None:
        """One message an output, as far as credit allows."""
        while self._backlog and not self.silent:
            peer, output = self._backlog[0]
            if not self.windows[peer].take():
                return
            self._backlog.pop(0)
            self._reply(peer, Stream([output]))

    def forget(self) -> None:
        """Lose every gateway, as after a break of the connection."""
        self.joined.clear()
        self.windows.clear()

    def _on_frames(self, peer: bytes, frames: list[bytes]) -> None:
        if self.silent:
            return
        message, bulk = ROUTER_REQUEST.decode(frames)
        if not isinstance(message, GatewayHello) and peer not in self.windows:
            self._reply(peer, RouterFailed("protocol_violation", "say GatewayHello first"))
            return
        match message:
            case GatewayHello():
                self.num_hellos, self.url = self.num_hellos + 1, message.url
                self.windows[peer] = CreditWindow(message.credit)
                self._reply(peer, RouterWelcome(
                    "r0", self.incarnation, self.model, self.max_model_len, self.vocab_size, self.num_engines,
                    ["auto"], "auto", self.eos_token_ids, self.revision, adapters=self.adapters,
                ))  # fmt: skip
            case GatewayPing():
                self.joined.set()
            case StreamCredit():
                self.windows[peer].grant(message.messages)
                self._flush()
            case Cancel():
                self._on_cancel(message.request_id)
            case Generate():
                served = Served(self, peer, message, decode_tokens(bulk[0]))
                self.served[message.request_id] = served
                if self.answer is not None:
                    self.answer(served)
                else:
                    self._requests.put_nowait(served)

    def _on_cancel(self, request_id: str) -> None:
        self.cancels.append(request_id)
        served = self.served.get(request_id)
        if served is None:
            return
        served.cancelled.set()
        if self.confirm_cancels and not served.over:
            served.end("abort")

    async def _beat(self) -> None:
        while True:
            if not self.silent:
                beat = RouterHeartbeat(
                    self.incarnation, self.num_engines, len(self.served), 100, self.model,
                    self.max_model_len, self.vocab_size, self.eos_token_ids, self.revision, 0.0,
                    *self.engines_load, self.adapters,
                )  # fmt: skip
                for peer in list(self.windows):
                    self._reply(peer, beat)
            self._beaten.set()
            self._beaten.clear()
            await asyncio.sleep(BEAT_S)


@dataclass
class GatewayWorld:
    """A served gateway, its routers, and where it listens."""

    address: str
    bus: ZmqBus
    routers: list[ScriptedRouter]
    stop: asyncio.Event
    serving: asyncio.Task[None]
    lifecycle: Lifecycle

    @property
    def router(self) -> ScriptedRouter:
        return self.routers[0]

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])


@asynccontextmanager
async def gateway_world(
    directory: Path,
    *settings: str,
    num_routers: int = 1,
    wait_ready: bool = True,
    drain_s: float = 1.0,
    keys: CurveKeys | None = None,
    **router: Any,
) -> AsyncIterator[GatewayWorld]:
    """``settings``: ``section.field=value``. ``router``: arguments of :class:`ScriptedRouter`."""
    bus = ZmqBus(linger_s=0.0, keys=keys)
    routers = [ScriptedRouter(bus, **router) for _ in range(num_routers)]
    addresses = json.dumps([router.address for router in routers])
    stop = asyncio.Event()
    overrides = [
        f"model.path={directory}", "model.name=tiny", "gateway.port=0", f"gateway.routers={addresses}",
        f"bus.heartbeat_interval_s={BEAT_S}", "bus.liveness=200", "gateway.id=g0", *settings,
    ]  # fmt: skip
    lifecycle = Lifecycle()
    serving = asyncio.create_task(serve_with(overrides, lifecycle, stop, drain_s))
    address = asyncio.create_task(lifecycle.wait_ready())
    try:
        either: list[asyncio.Future[Any]] = [address, serving]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if serving.done():
            serving.result()
        world = GatewayWorld(address.result(), bus, routers, stop, serving, lifecycle)
        if wait_ready:
            for scripted in routers:
                await scripted.joined.wait()
        yield world
    finally:
        stop.set()
        address.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        for scripted in routers:
            await scripted.close()
        bus.close()
    serving.result()


class Connection:
    """A bare HTTP connection with one request on it, so that a test can leave it unread or cut it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self._writer = writer

    async def send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def head(self) -> tuple[int, dict[str, str]]:
        """Status and headers of the answer."""
        lines = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
        return int(lines[0].split()[1]), headers

    async def chunk(self) -> bytes:
        """One chunk of a chunked answer, as the server wrote it; empty at the end."""
        size = int(await self.reader.readline(), 16)
        return (await self.reader.readexactly(size + 2))[:-2]

    async def events(self) -> list[Any]:
        """The rest of a stream: each event's JSON, and ``"[DONE]"``."""
        events: list[Any] = []
        while chunk := await self.chunk():
            for line in chunk.split(b"\n\n")[:-1]:
                data = line.removeprefix(b"data: ")
                events.append("[DONE]" if data == b"[DONE]" else json.loads(data))
        return events

    def stop_reading(self) -> None:
        self._writer.transport.pause_reading()  # type: ignore[attr-defined]

    def go_on_reading(self) -> None:
        self._writer.transport.resume_reading()  # type: ignore[attr-defined]

    def half_close(self) -> None:
        self._writer.write_eof()

    def reset(self) -> None:
        """Cut it with a RST instead of a FIN."""
        self._writer.transport.abort()

    def close(self) -> None:
        self._writer.close()


@asynccontextmanager
async def post(world: GatewayWorld, path: str, **body: Any) -> AsyncIterator[Connection]:
    """Send a request for the model; nothing is read yet."""
    content = json.dumps({"model": "tiny", **body}).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: test\r\ncontent-length: {len(content)}\r\n\r\n"
    async with connect(world) as connection:
        await connection.send(head.encode() + content)
        yield connection


@asynccontextmanager
async def connect(world: GatewayWorld) -> AsyncIterator[Connection]:
    connection = Connection(*await asyncio.open_connection("127.0.0.1", world.port))
    try:
        yield connection
    finally:
        connection.close()
