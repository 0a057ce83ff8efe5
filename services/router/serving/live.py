"""One request while it lives in a router: what has been delivered, where it runs, why it may be interrupted.

Plain state, written by serving.py and attempt.py. Knows no gateways but as an owner and a sink.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from microserve.protocol.errors import Draining, MeshError
from microserve.protocol.messages.router import Output
from microserve.services.links.stream import Tokens
from microserve.services.router.authoring.mesh import RETRY_AFTER_S
from microserve.services.router.request.phase import PhaseClock
from microserve.services.router.request.scope import RequestScope

if TYPE_CHECKING:
    from microserve.services.router.rollout.shadow import Rehearsal

Sink = Callable[[Output], None]


class Interrupt(Enum):
    """Why a request was cancelled."""

    CLIENT = "the client is gone"
    STOP = "the router stops"


@dataclass(slots=True, eq=False)
class LiveRequest:
    request_id: str
    owner: bytes
    sink: Sink
    strategy: str
    clock: PhaseClock
    task: asyncio.Task[None] | None = None
    scope: RequestScope | None = None
    num_prompt_tokens: int = 0
    offset: int = 0
    """Of the first token that this router may bring."""
    delivered: list[int] = field(default_factory=list)
    """Output tokens handed to the gateway, by this router or one before it."""
    engines: list[str] = field(default_factory=list)
    """Those of attempts that have failed."""
    last: Tokens | None = None
    """The chunk that ends the stream."""
    interrupt: Interrupt | None = None
    ended: bool = False
    version: int = 0
    """Of its strategy, if that was published."""
    rehearsal: Rehearsal | None = None
    """Of a shadow version."""
    is_blamed: bool = False
    """Its strategy has made a mistake."""
    is_slow: bool = False
    """Its strategy has held the router for longer than it may."""

    @property
    def interruption(self) -> MeshError | None:
        """The end that its interrupt means; None: nobody is left to tell."""
        if self.interrupt is Interrupt.CLIENT:
            return None
        return Draining("the router stops", retry_after_s=RETRY_AFTER_S)
