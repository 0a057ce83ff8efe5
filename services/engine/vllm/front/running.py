"""One request at vLLM, for one action: it generates, sends, or is parked to receive; and what it receives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from microserve.protocol.messages.engine import TokenLogprob
from microserve.protocol.messages.kv.grant import Grant
from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.services.engine.core.request.received import ReceivedGrant
from microserve.services.engine.core.request.record import CommitJob, RecordOf
from microserve.services.engine.vllm.link import Ask, Receive


@dataclass(slots=True)
class Transfer:
    """What a sending request owes to its receiver, and what of it has come so far."""

    grant: Grant
    lane: int
    begin: int
    end: int
    first_token: int | None = None
    first_logprob: TokenLogprob | None = None
    is_computed: bool = False
    """vLLM has said its token, which nobody may want."""
    nbytes: int | None = None
    """None until all is put."""
    put_s: float = 0.0
    heap: str = ""
    """Kind of the heap that it went through."""


@dataclass(slots=True, eq=False)
class Running:
    owner: bytes
    request_id: str
    call_ids: list[int]
    """Calls that wait for an answer."""
    token_ids: list[int]
    """What vLLM is given as its prompt."""
    num_prompt_tokens: int
    """Of these; the rest is output of before."""
    params: SamplingParams | None
    """None: nobody wants its token."""
    sampling: dict[str, Any]
    """In vLLM's words (sampling.py)."""
    salt: str
    arrived_at: float
    deadline: float
    adapter: str = ""
    """With which it is computed; empty: the model alone."""
    traceparent: str = ""
    """Of the action that it is; empty: in no trace."""
    ask: Ask | None = None
    """Of the connector."""
    transfer: Transfer | None = None
    received: ReceivedGrant | None = None
    """What it builds on, until that has settled."""
    await_first: bool = False
    first_token: int | None = None
    """The sender's, once it is here."""
    receive_id: int | None = None
    """Of what it builds on: pinned at vLLM until this one has taken it, or ends."""
    received_tokens: int = 0
    cached_tokens: int = 0
    num_delivered: int = 0
    """Output tokens that the router has, or gets from another engine."""
    is_over: bool = False
    is_accepted: bool = False
    """vLLM has it."""
    is_early: bool = False
    """vLLM began on it before all KV was in."""
    is_foreign: bool = False
    """It builds on KV of another numerics class."""
    is_mixed: bool = False
    """A token has been made from such KV."""
    ready_at: float = 0.0
    first_token_at: float | None = None
    last_token_at: float | None = None
    cancel: Callable[[], None] = field(default=lambda: None)
    """Take it from vLLM."""

    @property
    def is_parked(self) -> bool:
        """It is there for its blocks."""
        return isinstance(self.ask, Receive)


@dataclass(slots=True)
class Pace:
    """How fast a receive's last chunk comes in."""

    num_layers: int = 0
    """In, from the first one on."""
    first_at: float = 0.0
    moved_at: float = 0.0


@dataclass(slots=True, eq=False)
class ParkedReceive:
    """From ``PrepRecv`` until vLLM has its blocks again, or never had any."""

    id: int
    record: RunningRecord
    parked: Running
    salt: str
    end: int
    num_pinned: int
    allocate_by: float
    received: ReceivedGrant | None = None
    """From its grant on."""
    commit: CommitJob | None = None
    """What waits for its being cached."""
    is_taken: bool = False
    is_cached: bool = False
    is_unwanted: bool = False
    """To be dropped as soon as it is cached."""
    is_closed: bool = False
    """Its grant was closed before it was taken."""
    is_dropped: bool = False
    pace: Pace = field(default_factory=Pace)
    is_started: bool = False
    """Early (early.py)."""
    has_arrived: bool = False
    """... and all of it was in when vLLM used it."""
    parked_over_at: float = float("inf")
    """... and its parked request has ended."""


RunningRecord = RecordOf[Running]
