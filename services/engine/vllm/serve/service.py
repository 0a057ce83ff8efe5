"""One engine process that stands for a ``vllm serve`` of somebody else's: waits for it, asks it, watches it.

    /v1/models, /version, /metrics ─> what it is ─> a token from it ─> core ─> shell
    /health, /metrics ─> is it there, does it go on?

Needs its model's directory for vocabulary and ends of sequence; weights are the server's alone.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import structlog

from microserve.kvcache.layout import KvLayout
from microserve.protocol import log
from microserve.protocol.bus.transport import Bus
from microserve.protocol.errors import ConfigError, EngineLost, MeshError
from microserve.protocol.messages.engine_info import GRAMMAR
from microserve.protocol.messages.numerics import Numerics
from microserve.protocol.metrics.port import MetricsPort
from microserve.protocol.process.lifecycle import Lifecycle
from microserve.protocol.settings.settings import Settings
from microserve.protocol.types import MAX_PROMPT_TOKENS
from microserve.services.engine.core.checks import Limits
from microserve.services.engine.kind import EngineKind
from microserve.services.engine.model.directory.end_tokens import eos_of
from microserve.services.engine.model.directory.model_files import read_json
from microserve.services.engine.shell.shell import EngineShell
from microserve.services.engine.vllm.front.running import Running
from microserve.services.engine.vllm.front.sampling import probe_of
from microserve.services.engine.vllm.serve.core import ServedCore
from microserve.services.engine.vllm.serve.http import NotAnswered, Refused, Server
from microserve.services.engine.vllm.serve.served import PATH, Served

BACKEND = "vllm-serve"
ASK_TIMEOUT_S = 5.0
WAIT_S = 1.0
"""Pause between two attempts to reach a server that is not there yet."""
LOOK_S = 1.0
LOST_S = 5.0
"""A server that has not answered for so long is lost."""
EXPIRE_S = 0.25
"""Pause between looks at deadlines."""

_CACHE = re.compile(r"^vllm:cache_config_info\{([^}]*)\}", re.M)
_LABEL = re.compile(r'(\w+)="([^"]*)"')

_logger = structlog.get_logger()


class _Model(msgspec.Struct):
    id: str
    parent: str | None = None
    max_model_len: int | None = None


class _Models(msgspec.Struct):
    data: list[_Model]


@dataclass(frozen=True, slots=True)
class Facts:
    """What a server says of itself."""

    model: str
    version: str
    max_model_len: int
    block_size: int
    """0: not said."""
    num_blocks: int


async def run_serve_engine(settings: Settings, bus: Bus, lifecycle: Lifecycle) -> None:
    """Serve until cancelled. Raises :class:`ConfigError` when server or model cannot be what is asked for."""
    settings.check()
    if not settings.model.path:
        raise ConfigError("model.path is not set", field="model.path")
    directory = Path(settings.model.path)
    config = read_json(directory / "config.json")
    server = Server(settings.vllm.url, settings.vllm.api_key)
    name = settings.model.name or directory.name
    facts = await until_up(server, name, lifecycle.status)
    await require_tokens(Served(server, facts.model), server)
    layout = layout_of(settings, config, facts, name)
    max_model_len = min(
        facts.max_model_len, settings.engine.max_model_len or MAX_PROMPT_TOKENS, MAX_PROMPT_TOKENS
    )
    core = ServedCore(
        Served(server, facts.model),
        layout,
        engine_id=settings.engine.id or f"engine-{secrets.token_hex(4)}",
        incarnation=secrets.randbits(62) | 1,
        kind=EngineKind(BACKEND, facts.version, (GRAMMAR,)),
        numerics=Numerics(f"{BACKEND}-{facts.version}", is_exact=False),
        limits=Limits(
            max_model_len=max_model_len,
            vocab_size=_number(config, "vocab_size"),
            num_blocks=layout.num_blocks,
            max_waiting=settings.engine.max_waiting,
            eos_token_ids=eos_of(directory, config),
        ),
        max_num_seqs=settings.engine.max_num_seqs,
    )
    shell = EngineShell(settings, bus, lifecycle, core, partial(ServedSteps, core, server))
    try:
        with MetricsPort(settings.metrics.host, settings.engine.metrics_port, shell.readings):
            await shell.run()
    finally:
        shell.close()


async def until_up(server: Server, name: str, tell: Callable[[str], None]) -> Facts:
    """Wait for a server that is not there yet. Raises :class:`ConfigError` for one that cannot be it."""
    while True:
        try:
            return await facts_of(server, name)
        except NotAnswered as error:
            tell(f"waiting for vllm serve: {error}")
        await asyncio.sleep(WAIT_S)


async def facts_of(server: Server, name: str) -> Facts:
    """Raises :class:`NotAnswered`, or :class:`ConfigError` for a server that cannot be the one."""
    try:
        listed = await server.text("/v1/models", timeout_s=ASK_TIMEOUT_S)
        models = msgspec.json.decode(listed, type=_Models).data
        version = str(msgspec.json.decode(await server.text("/version", timeout_s=ASK_TIMEOUT_S))["version"])
    except Refused as refused:
        field = "vllm.api_key" if refused.status in (401, 403) else "vllm.url"
        raise ConfigError(
            f"{field}: {server.url} answers {refused.status}: {refused.detail}", field=field
        ) from None
    except (msgspec.DecodeError, KeyError, TypeError):
        raise ConfigError(f"vllm.url: {server.url} is no vllm serve", field="vllm.url") from None
    own = [each for each in models if each.parent is None and each.max_model_len]
    found = next((each for each in own if each.id == name), own[0] if len(own) == 1 else None)
    if found is None or not found.max_model_len:
        has = ", ".join(each.id for each in own) or "no model"
        raise ConfigError(f"model.name: {server.url} has {has}, not {name!r}", field="model.name")
    try:
        cache = dict(
            _LABEL.findall("".join(_CACHE.findall(await server.text("/metrics", timeout_s=ASK_TIMEOUT_S))))
        )
    except Refused:
        cache = {}
    sizes = [
        int(value) if (value := cache.get(key, "")).isdigit() else 0
        for key in ("block_size", "num_gpu_blocks")
    ]
    return Facts(found.id, version, found.max_model_len, *sizes)


async def require_tokens(served: Served, server: Server) -> None:
    """It takes tokens and gives tokens. Raises :class:`ConfigError`, or :class:`MeshError` as it comes."""
    probe = Running(
        owner=b"",
        request_id=f"probe-{secrets.token_hex(4)}",
        call_ids=[],
        token_ids=[0],
        num_prompt_tokens=1,
        params=None,
        sampling=probe_of(),
        salt="",
        arrived_at=0.0,
        deadline=0.0,
    )
    try:
        stream = await served.add(probe)
        while not (output := await stream.next()).finish:
            pass
    except EngineLost:
        raise
    except MeshError as error:
        raise ConfigError(
            f"vllm.url: {server.url}{PATH} cannot be used: {error.detail}", field="vllm.url"
        ) from error
    if output.finish != "length":
        raise ConfigError(f"vllm.url: {server.url}{PATH} gives no token", field="vllm.url")


def layout_of(settings: Settings, config: dict[str, Any], facts: Facts, name: str) -> KvLayout:
    """Its model's, as far as routers want to know: there is no heap. Raises :class:`ConfigError`."""
    heads = _number(config, "num_attention_heads")
    block_size = facts.block_size or settings.kvcache.block_size
    return KvLayout(
        model=name,
        num_layers=_number(config, "num_hidden_layers"),
        num_blocks=facts.num_blocks or -(-facts.max_model_len // block_size) * settings.engine.max_num_seqs,
        block_size=block_size,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or _number(config, "hidden_size") // heads,
        dtype=settings.model.dtype,
    )


def _number(config: dict[str, Any], name: str) -> int:
    value = config.get(name)
    if not isinstance(value, int) or value < 1:
        raise ConfigError(f"model.path: config.json has no {name}", field="model.path")
    return value


class ServedSteps:
    """What runs a :class:`ServedCore`: the server computes, and this looks at deadlines and at the server."""

    def __init__(
        self, core: ServedCore, server: Server, on_output: Callable[[], None], on_crash: Callable[[], None]
    ) -> None:
        self._core, self._server, self._on_crash = core, server, on_crash
        self._tasks: list[asyncio.Task[None]] = []
        self._computed = ""
        core.on_output = on_output

    def start(self) -> None:
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._expire()), loop.create_task(self._watch())]

    def stop(self, timeout_s: float) -> bool:
        for task in self._tasks:
            task.cancel()
        return True

    async def _expire(self) -> None:
        while True:
            self._core.expire()
            await asyncio.sleep(EXPIRE_S)

    async def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        heard_at = loop.time()
        while True:
            try:
                await self._look()
                heard_at = loop.time()
            except (NotAnswered, Refused) as error:
                if loop.time() - heard_at > LOST_S:
                    _logger.error(log.STEP_FAILED, detail=f"vllm serve is lost: {error}")
                    self._on_crash()
                    return
            await asyncio.sleep(LOOK_S)

    async def _look(self) -> None:
        """At its health, and while it has work of ours at whether it goes on."""
        await self._server.text("/health", timeout_s=ASK_TIMEOUT_S)
        if not self._core.is_busy:
            return
        try:
            text = await self._server.text("/metrics", timeout_s=ASK_TIMEOUT_S)
        except Refused:  # it has none: that it is well must do
            self._core.heard()
            return
        computed = "\n".join(line for line in text.splitlines() if line.startswith("vllm:"))
        if computed != self._computed or not computed:
            self._computed = computed
            self._core.heard()
