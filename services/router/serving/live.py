"""One request while it lives in a router, and how its end is told: delivered tokens, engines, interrupts;
the gateway's ``Ended`` and the canonical log line.

Plain state, written by serving.py and attempt.py. Knows no gateways but as an owner and a sink.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum

import msgspec
import structlog

from microserve.protocol import log
from microserve.protocol.errors import Draining, EngineLost, MeshError
from microserve.protocol.messages.engine import Finished, Usage
from microserve.protocol.messages.kv.coding import Coding
from microserve.protocol.messages.numerics import UNKNOWN, Numerics
from microserve.protocol.messages.request.attributes import TENANT
from microserve.protocol.messages.request.prompt_logprobs import FIRST_POSITION, PromptLogprobs
from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.protocol.messages.router import Ended, Output, Phases
from microserve.services.links.stream import Tokens
from microserve.services.router.authoring.definition import Strategy
from microserve.services.router.engines.connection import EngineLeaving
from microserve.services.router.oversight.author import Author
from microserve.services.router.request.decision import Send
from microserve.services.router.request.phase import PhaseClock
from microserve.services.router.request.records import Head
from microserve.services.router.request.request import RETRY_AFTER_S, Request
from microserve.services.router.request.scope import RequestScope
from microserve.services.router.request.trace import UNTRACED, Relay, Trace
from microserve.services.router.request.trail import Trail
from microserve.services.router.rollout.shadow import Rehearsal

Sink = Callable[[Output], None]
MAX_CODINGS = 16
"""In a line, the first ones."""


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
    trace: Trace | Relay = UNTRACED
    task: asyncio.Task[None] | None = None
    scope: RequestScope | None = None
    num_prompt_tokens: int = 0
    offset: int = 0
    """Of the first token that this router may bring."""
    delivered: list[int] = field(default_factory=list)
    """Output tokens handed to the gateway, by this router or one before it."""
    revision: str = ""
    """Of the model that made what was delivered."""
    numerics: Numerics | None = None
    """In which class that was made; None: nothing was."""
    next_row: int = FIRST_POSITION
    """Of the prompt's log-probabilities, the position of the first that the gateway has not been handed."""
    is_continued: bool = False
    """The gateway has some of the answer from another router."""
    alone: str = ""
    """Why one engine alone serves it, whatever its strategy says."""
    engines: list[str] = field(default_factory=list)
    """Those of attempts that have failed."""
    heaps: list[str] = field(default_factory=list)
    """Kinds of heap that KV was sent through, in all attempts."""
    codings: list[tuple[Send, Coding]] = field(default_factory=list)
    """What became of sends that were asked to go by a codec, likewise."""
    last: Tokens | None = None
    """The chunk that ends the stream."""
    interrupt: Interrupt | None = None
    ended: bool = False
    served_by: Strategy | None = None
    version: int = 0
    """Of its strategy, if that was published."""
    share: str = ""
    """As what that serves it."""
    num_unheld: int = 0
    """Prompt tokens that no engine was known to hold when it came."""
    num_moves: int = 0
    rehearsal: Rehearsal | None = None
    """Of a shadow version."""
    author: Author | None = None
    """Of the attempt that runs; None: it is the router's own."""
    is_class_told: bool = False
    """To its gateway, in which class its tokens were made."""
    is_blamed: bool = False
    """Its strategy has made a mistake."""
    trails: list[Trail] = field(default_factory=list)
    """Of its attempts, if they are recorded."""
    is_slow: bool = False
    """Its strategy has held the router for longer than it may."""
    capped: SamplingParams | None = None
    """Its sampling, if its strategy has capped that."""
    capped_to: int = 0
    """Most output tokens, if those were capped."""

    def made_in(self, numerics: Numerics) -> Numerics | None:
        """Its newest tokens are of this class: what the whole is now, if its gateway has to be told: with the
        first tokens of this router, also where an answer goes on as it began, and with every change."""
        if numerics is self.numerics and self.is_class_told:
            return None
        before = self.numerics
        self.numerics = numerics if before is None else before.joined(numerics)
        if self.numerics == before and self.is_class_told:
            return None
        self.is_class_told = True
        return self.numerics

    def fresh_rows(self, prompt: PromptLogprobs) -> PromptLogprobs | None:
        """Of what an attempt brings of the prompt, what none before it has brought; that is delivered now."""
        fresh = prompt.behind(self.next_row)
        if not len(fresh):
            return None
        self.next_row = fresh.end
        return fresh

    def keep(self, scope: RequestScope) -> None:
        """What an attempt leaves: what its strategy has capped holds for the next ones."""
        self.heaps += [heap for heap in scope.heaps if heap not in self.heaps]
        self.codings += scope.decision.codings.items()
        if scope.sampling is not scope.request.sampling:
            self.capped = scope.sampling
            if scope.sampling.max_tokens < scope.request.sampling.max_tokens:
                self.capped_to = scope.sampling.max_tokens

    def replaced_by(self, revision: str) -> MeshError | None:
        """This model is served now: what the answer ends with, where it was not the one that began it."""
        has_begun = bool(self.delivered) or self.next_row > FIRST_POSITION or self.is_continued
        if has_begun and self.revision not in ("", revision):
            return EngineLost(
                f"the model was replaced: {self.revision} had begun the answer, {revision} is here"
            )
        self.revision = revision
        return None

    @property
    def interruption(self) -> MeshError | None:
        """The end that its interrupt means; None: nobody is left to tell."""
        if self.interrupt is Interrupt.CLIENT:
            return None
        return Draining("the router stops", retry_after_s=RETRY_AFTER_S)

    @property
    def why(self) -> str:
        """How the engines of its last attempt were chosen, in a line."""
        if not self.trails:
            return ""
        told = self.trails[-1].in_short()
        return f"attempt {len(self.trails)}: {told}" if len(self.trails) > 1 else told


_logger = structlog.get_logger()


def finished_well(live: LiveRequest, finished: Finished, phases: Phases, engines: list[str]) -> Ended:
    """The decode engine brought it to its end."""
    return Ended(
        finished.reason,
        finished.usage,
        phases,
        live.strategy,
        engines,
        stop_token_id=finished.stop_token_id,
        strategy_version=live.version,
        numerics=live.numerics or UNKNOWN,
        why=live.why,
        capped_to=live.capped_to,
        share=live.share,
        num_moves=live.num_moves,
        alone=live.alone,
        heaps=live.heaps,
    )


def cut_short(
    live: LiveRequest, error: MeshError | None, usage: Usage, phases: Phases, engines: list[str]
) -> Ended:
    """It failed; without an error, its client is gone."""
    ended = Ended(
        "abort" if error is None else "error",
        usage,
        phases,
        live.strategy,
        engines,
        strategy_version=live.version,
        numerics=live.numerics or UNKNOWN,
        why=live.why,
        capped_to=live.capped_to,
        share=live.share,
        num_moves=live.num_moves,
        alone=live.alone,
        heaps=live.heaps,
    )
    if error is None:
        return ended
    return msgspec.structs.replace(
        ended, code=error.code, detail=error.detail, field=error.field, retry_after_s=error.retry_after_s
    )


def head_of(live: LiveRequest, request: Request, ended: Ended | None) -> Head:
    """What is recorded of it beside its attempts; None: it still runs."""
    return Head(
        live.strategy,
        live.version,
        bool(request.attributes.get(TENANT)),
        [*request.attributes],
        request.block_size,
        live.num_prompt_tokens,
        len(live.delivered),
        (request if live.scope is None else live.scope).sampling.max_tokens,
        "" if ended is None else ended.reason,
        "" if ended is None else ended.code,
    )


def write_continued(live: LiveRequest, error: MeshError, attempt: int) -> None:
    """Why what it was served by goes on with it no longer, and another ``attempt`` follows."""
    tell = _logger.info if isinstance(error, EngineLeaving) else _logger.warning
    tell(
        log.REQUEST_CONTINUED,
        request_id=live.request_id,
        code=error.code,
        error=error.detail,
        delivered=len(live.delivered),
        attempt=attempt,
    )


def _told(send: Send, coding: Coding) -> dict[str, str | int | float]:
    return {
        "source": send.source,
        "target": send.target,
        "profile": coding.profile,
        "reason": coding.reason,
        "raw_bytes": coding.raw_nbytes,
        "wire_bytes": coding.wire_nbytes,
        "encode_s": round(coding.encode_s, 6),
        "predicted_s": round(coding.predicted_s, 6),
        "observed_s": round(coding.observed_s, 6),
        "link_bytes_per_s": round(coding.link_bytes_per_s),
    }


def write_line(request_id: str, ended: Ended, codings: Sequence[tuple[Send, Coding]] = ()) -> None:
    """One line a request: numbers and names, no text and no tokens."""
    usage, phases = ended.usage, ended.phases
    _logger.info(
        log.REQUEST_FINISHED,
        request_id=request_id,
        strategy=ended.strategy,
        strategy_version=ended.strategy_version,
        share=ended.share,
        moves=ended.num_moves,
        alone=ended.alone,
        engines=ended.engines,
        heaps=ended.heaps,
        codings=[_told(*each) for each in codings[:MAX_CODINGS]],
        numerics=ended.numerics.name,
        exact=ended.numerics.is_exact,
        reason=ended.reason,
        code=ended.code,
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=usage.cached_tokens,
        received_tokens=usage.received_tokens,
        output_tokens=usage.output_tokens,
        capped_to=ended.capped_to,
        **{name: round(getattr(phases, name), 6) for name in Phases.__struct_fields__},
    )
