"""Where requests of tenants wait for their turn: what the mesh has room for, and who is let through.

Owns the futures that requests wait on and the clock of their queue; who is due is turns.py's. Looks again at
every beginning and end, and while anybody waits at intervals, since engines come and go without a word here.
"""

from __future__ import annotations

import asyncio
import math

from microserve.protocol.errors import QueueFull
from microserve.services.router.engines.registry import Registry
from microserve.services.router.request.request import RETRY_AFTER_S
from microserve.services.router.serving.turns import Room, Turns

BACKLOG_S = 0.01
"""Of prompts that a tenant may have before an engine: what others find there costs them no more."""
UNKNOWN_BACKLOG_TOKENS = 128
"""The same while an engine's rate has not been measured."""
LOOK_S = 0.1
LEAVE_FREE = 8
"""A tenant may have so many times as many live requests as there is room for more."""


class Turnstile:
    """Every live request of a tenant goes through; those without one never meet it."""

    def __init__(self, registry: Registry, max_requests: int, headroom: float) -> None:
        self._registry = registry
        self._max_requests = max_requests
        self._turns = Turns(headroom)
        self._waiting: dict[str, asyncio.Future[None]] = {}
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None

    @property
    def is_idle(self) -> bool:
        """No request of a tenant is live."""
        return self._turns.is_idle and not self._waiting

    @property
    def num_waiting(self) -> int:
        """Requests whose turn has not come."""
        return sum(not future.done() for future in self._waiting.values())

    def check(self, tenant: str, num_live: int) -> None:
        """Raises :class:`QueueFull` when there is no room for another request of this tenant, though there
        may be for one of somebody else."""
        own = self._turns.num_requests(tenant) if tenant else 0
        if own > LEAVE_FREE * (self._max_requests - num_live):
            raise QueueFull(f"{own} requests of {tenant!r} are live already", retry_after_s=RETRY_AFTER_S)

    def tokens_ahead(self, tenant: str) -> float:
        """Prompt tokens that must be computed before this tenant's next request has its turn."""
        return self._turns.tokens_ahead(tenant) if tenant else 0.0

    def enter(self, request_id: str, tenant: str, priority: int, num_tokens: int) -> bool:
        """Is it its turn already? Otherwise :meth:`wait` for it."""
        self._turns.enter(request_id, tenant, priority, num_tokens, self._loop.time())
        future = self._waiting[request_id] = self._loop.create_future()
        self._look()
        return future.done()

    async def wait(self, request_id: str) -> None:
        future = self._waiting.get(request_id)
        if future is not None:
            await future

    def computed(self, request_id: str) -> None:
        """Its first token is there."""
        self._turns.computed(request_id)
        self._look()

    def leave(self, request_id: str, num_output_tokens: int) -> None:
        """It has ended, whatever it was doing; unknown ones are fine."""
        self._turns.leave(request_id, num_output_tokens)
        future = self._waiting.pop(request_id, None)
        if future is not None:
            future.cancel()
        self._look()

    def _look(self) -> None:
        if not self._turns.num_waiting:
            return
        for request_id in self._turns.begin(self._room(), self._loop.time()):
            future = self._waiting.pop(request_id)
            if not future.done():
                future.set_result(None)
        if self._turns.num_waiting and self._timer is None:
            self._timer = self._loop.call_later(LOOK_S, self._look_again)

    def _look_again(self) -> None:
        self._timer = None
        self._look()

    def _room(self) -> Room:
        loads = [connection.load for connection in self._registry.usable()]
        if not loads:  # what becomes of requests then is their own attempts' business
            return Room(1, math.inf, math.inf, math.inf)
        # Other routers' requests are not counted: reports that are older than what has ended here would close
        # a mesh that is empty.
        num_places = sum(load.max_num_seqs or math.inf for load in loads)
        num_tokens = sum(load.prefill_tokens_per_s * BACKLOG_S or UNKNOWN_BACKLOG_TOKENS for load in loads)
        rates = [load.prefill_tokens_per_s for load in loads]
        return Room(len(loads), num_places, num_tokens, sum(rates) if all(rates) else math.inf)
