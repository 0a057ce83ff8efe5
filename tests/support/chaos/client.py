"""One try of one request, by the bus or by HTTP, and everything that the client saw of it.

The bus side is the gateway's own connection to routers, so it loses and finds routers as a gateway does; its
mailbox is ours and stricter: an offset that repeats or jumps is noted, not mended. Knows nothing of faults.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx

from microserve.gateway.routers.client import RouterClient
from microserve.gateway.routers.link import RouterLink
from microserve.gateway.routers.mailbox import Inbox, Mailbox
from microserve.protocol.bus.codec import encode_tokens
from microserve.protocol.bus.transport import Bus
from microserve.protocol.errors import MeshError
from microserve.protocol.messages.router import Generate, Output
from microserve.protocol.settings.settings import BusSettings
from tests.support.process.cases import Case
from tests.support.process.processes import MeshProcesses

HTTP_LOST = "http_lost"
"""Our own code: the connection to the gateway could not be made, or broke."""
NO_OUTCOME = "no_outcome"
"""Our own code: nothing came within the time allowed."""


@dataclass(eq=False)
class Attempt:
    """Times are monotonic seconds."""

    request_id: str
    door: str
    """The service that it was sent to: ``router``, ``router-1`` or ``gateway``."""
    started_at: float
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    """What HTTP brought instead of tokens."""
    num_tokens: int = 0
    arrivals: list[float] = field(default_factory=list)
    reason: str = ""
    """``length``, ``stop``, ``abort``, or ``error`` with a code."""
    code: str = ""
    detail: str = ""
    engines: list[str] = field(default_factory=list)
    retry_after_s: float = 0.0
    ended_at: float = 0.0
    violations: list[str] = field(default_factory=list)
    """Breaches of the stream's contract."""
    grown: asyncio.Event = field(default_factory=asyncio.Event)
    done: asyncio.Event = field(default_factory=asyncio.Event)

    def end(self, reason: str, code: str = "", detail: str = "") -> None:
        self.reason, self.code, self.detail = reason, code, detail
        self.ended_at = time.monotonic()
        self.grown.set()
        self.done.set()

    @property
    def completed(self) -> bool:
        return self.reason in ("length", "stop")


class _Strict(Mailbox):
    """Tells an :class:`Attempt` what comes, as it comes."""

    def __init__(self, attempt: Attempt, link: RouterLink) -> None:
        super().__init__(
            Inbox(),
            attempt.request_id,
            0,
            max_tokens=1 << 20,
            with_logprobs=False,
            cancel=lambda: link.cancel(attempt.request_id),
        )
        self.attempt = attempt

    def deliver(self, output: Output, now: float) -> None:
        attempt = self.attempt
        if attempt.done.is_set():
            attempt.violations.append("an output after the end")
            return
        if output.offset != len(attempt.tokens):
            attempt.violations.append(f"offset {output.offset}, have {len(attempt.tokens)}")
        if output.token_ids:
            attempt.tokens += output.token_ids
            attempt.num_tokens = len(attempt.tokens)
            attempt.arrivals.append(time.monotonic())
            attempt.grown.set()
        super().deliver(output, now)
        if output.ended is not None:
            attempt.engines = list(output.ended.engines)
            attempt.retry_after_s = output.ended.retry_after_s
            attempt.end(output.ended.reason, output.ended.code, output.ended.detail)

    def fail(self, error: MeshError) -> None:
        super().fail(error)
        if not self.attempt.done.is_set():
            self.attempt.retry_after_s = error.retry_after_s
            self.attempt.end("error", error.code, error.detail)


class Doors:
    """The ways in: every router by the bus, and the gateway by HTTP."""

    def __init__(self, routers: RouterClient, names: list[str], http: httpx.AsyncClient, model: str) -> None:
        self._links = dict(zip(names, routers.links, strict=True))
        self._http = http
        self._model = model

    async def wait_engines(self, count: int, timeout_s: float = 60.0) -> None:
        """Until every router knows exactly so many engines."""
        async with asyncio.timeout(timeout_s):
            while any(not link.joined or link.num_engines != count for link in self._links.values()):
                await asyncio.sleep(0.02)

    def usable(self, name: str) -> bool:
        """As a gateway judges a router; the gateway itself is simply tried."""
        link = self._links.get(name)
        return link is None or (link.joined and link.num_engines > 0)

    def start(self, attempt: Attempt, case: Case, *, strategy: str, ttl_s: float, salt: str) -> None:
        link = self._links[attempt.door]
        mailbox = _Strict(attempt, link)
        link.mailboxes[attempt.request_id] = mailbox
        message = Generate(attempt.request_id, self._model, case.params, ttl_s, strategy, salt)
        if not link.send(message, encode_tokens(case.prompt)):
            del link.mailboxes[attempt.request_id]
            attempt.end("error", "queue_full", "the queue to the router is full")

    def cancel(self, attempt: Attempt) -> None:
        mailbox = self._links[attempt.door].mailboxes.get(attempt.request_id)
        if mailbox is not None:
            mailbox.cancel()

    def forget(self, attempt: Attempt) -> None:
        self._links[attempt.door].mailboxes.pop(attempt.request_id, None)

    async def stream(self, attempt: Attempt, case: Case, *, strategy: str) -> None:
        """One streamed completion by HTTP; ends the attempt whatever happens."""
        params = case.params
        body = {
            "model": self._model,
            "prompt": list(case.prompt),
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
            **{
                name: getattr(params, name)
                for name in ("max_tokens", "temperature", "top_p", "top_k", "seed")
            },
        }
        headers = {"x-microserve-strategy": strategy}
        try:
            async with self._http.stream("POST", "/v1/completions", json=body, headers=headers) as reply:
                if reply.status_code != httpx.codes.OK:
                    attempt.retry_after_s = float(reply.headers.get("retry-after", 0.0))
                    _end_by(attempt, json.loads(await reply.aread())["error"])
                    return
                async for line in reply.aiter_lines():
                    if line.startswith("data: ") and _take_event(attempt, line.removeprefix("data: ")):
                        return
            attempt.end("error", HTTP_LOST, "the stream ended before [DONE]")
        except httpx.TransportError as error:
            attempt.end("error", HTTP_LOST, f"{type(error).__name__}: {error}")


@contextlib.asynccontextmanager
async def open_doors(bus: Bus, mesh: MeshProcesses, settings: BusSettings) -> AsyncIterator[Doors]:
    """Connections to every router of a mesh, and a client of its gateway (which it need not have)."""
    model = mesh.model.name
    routers = RouterClient(
        bus,
        list(mesh.router_addresses.values()),
        gateway_id="chaos",
        incarnation=time.time_ns(),
        model=model,
        credit=settings.credit,
        heartbeat_interval_s=settings.heartbeat_interval_s,
        liveness=settings.liveness,
        clock=time.monotonic,
    )
    routers.start()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=8)
    try:
        async with httpx.AsyncClient(base_url=mesh.gateway_url, timeout=None, limits=limits) as http:
            yield Doors(routers, list(mesh.router_addresses), http, model)
    finally:
        await routers.close()


def _take_event(attempt: Attempt, data: str) -> bool:
    """True at the end of the stream."""
    if data == "[DONE]":
        reason = attempt.reason
        if not reason:
            attempt.violations.append("[DONE] without a finish_reason")
        attempt.end(reason or "error")
        return True
    event: dict[str, Any] = json.loads(data)
    if "error" in event:
        _end_by(attempt, event["error"])
        return True
    for choice in event["choices"]:
        if choice["text"]:
            attempt.text += choice["text"]
            attempt.arrivals.append(time.monotonic())
            attempt.grown.set()
        attempt.reason = choice["finish_reason"] or attempt.reason
    if event.get("usage"):
        attempt.num_tokens = event["usage"]["completion_tokens"]
    return False


def _end_by(attempt: Attempt, error: dict[str, Any]) -> None:
    attempt.end("error", str(error["code"]), str(error["message"]))
