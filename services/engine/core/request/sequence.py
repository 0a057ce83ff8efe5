"""One request's life inside an engine: its tokens, its blocks, how far its KV goes.

    token_ids   |------------ prompt ------------|---- output ----|
    KV stands   [0, num_computed)                  in blocks[0 : ceil(num_computed / block_size)]
    shared      [0, num_cached)                    blocks of the prefix cache, never written

Plain state; the scheduler moves it, ``KvMemory`` owns what its blocks mean.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from microserve.kvcache.grant.writer import LaneWriter
from microserve.kvcache.heap.heap import PeerHeap
from microserve.kvcache.prefix.hash import BlockHash, HashChain
from microserve.protocol.errors import MeshError
from microserve.protocol.messages.engine import TokenLogprob
from microserve.protocol.messages.kv.grant import Grant
from microserve.protocol.messages.request.prompt_logprobs import PromptLogprobs
from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.services.engine.core.batch import Scored, ScoreSpec
from microserve.services.engine.core.coding.outgoing import Outgoing
from microserve.services.engine.core.request.received import ReceivedGrant
from microserve.services.engine.guidance.guide import Guide, Guiding


class SequenceState(Enum):
    COMPILING = "compiling"
    """Its grammar is compiled."""
    CLAIMING = "claiming"
    """Its lane is taken, behind a network."""
    RECEIVING = "receiving"
    """KV is on its way from another engine."""
    WAITING = "waiting"
    RUNNING = "running"
    ENCODING = "encoding"
    """A send of which all is computed, and not all encoded and put."""
    FINISHED = "finished"


class Claim(Protocol):
    """A lane that is being taken (claims.py)."""

    @property
    def is_done(self) -> bool: ...
    def take_into(self, transfer: Transfer) -> None:
        """Once it is done. Raises :class:`MeshError`: why it could not be taken."""

    def cancel(self) -> None:
        """Nobody wants it: it is let go, now or when it is there."""


@dataclass(slots=True)
class Transfer:
    """What a sending sequence owes to its receiver: KV of ``[begin, end)`` into ``grant``."""

    grant: Grant
    lane: int
    begin: int
    end: int
    sent_until: int
    """Rows below it have been put in every layer; starts at ``max(begin, grant.matched)``."""
    writer: LaneWriter | None = None
    """None until the first step that sends, where its receiver is near: an unclaimed lane can be closed at no
    cost."""
    claim: Claim | None = None
    """Its lane in the taking, where that waits for a network."""
    peer: PeerHeap | None = None
    """What the writer writes into."""
    is_put: bool = False
    """Rows of the blocks that the sequence has now were put: they may be read until the peer has them."""
    outgoing: Outgoing | None = None
    """What goes by a codec, and what is to be told of that; None: none was asked for."""
    error: MeshError | None = None
    nbytes: int = 0
    put_s: float = 0.0


def is_put(transfer: Transfer) -> bool:
    """All that was given to it is on its way."""
    return transfer.outgoing is None or transfer.outgoing.is_idle


ClaimLane = Callable[[Transfer, Callable[[], None]], Claim | None]
"""Begins to take the lane of a send; what is called, by another thread, when it is taken or cannot be. None:
whoever sends takes it at once."""


@dataclass(slots=True, eq=False)
class Sequence:
    """A generating sequence, or (with ``transfer``) one that prefills for another engine."""

    sequence_id: int
    owner: bytes
    """Routing id of the router that asked; everything dies with it."""
    request_id: str
    call_id: int
    token_ids: list[int]
    num_prompt_tokens: int
    params: SamplingParams | None
    """None: a send that does not sample."""
    deadline: float
    arrived_at: float
    chain: HashChain
    salt: str = ""
    traceparent: str = ""
    """Of the action that it is; empty: in no trace."""
    state: SequenceState = SequenceState.WAITING
    blocks: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_cached: int = 0
    num_inserted: int = 0
    """Blocks that have been offered to the prefix cache."""
    state_from: list[int] = field(default_factory=list)
    """Of a hybrid model: blocks with its state at ``num_computed``; empty at 0 (state.py)."""
    state_to: list[int] = field(default_factory=list)
    """And those that the next step writes it into."""
    keeps: list[int] = field(default_factory=list)
    """Lengths at which its state is to be kept: a chunk ends there."""
    kept: BlockHash | None = None
    """Where it was kept last among the tokens that it generated."""
    num_delivered: int = 0
    """Output tokens already handed to the router (or known to it)."""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    """Of the output tokens not yet delivered."""
    num_scored: int = field(init=False)
    """Prompt tokens whose log-probabilities are settled: told, or not asked for. The first has none."""
    scored: PromptLogprobs | None = None
    """Of these, those not yet delivered."""
    transfer: Transfer | None = None
    guide: Guide | None = None
    """What its tokens are chosen by; None: all may be."""
    guiding: Guiding | None = None
    """The guide in the making: it does not run before."""
    received: ReceivedGrant | None = None
    """The grant that its KV comes by, until that is settled."""
    await_first: bool = False
    has_foreign_kv: bool = False
    """Some of the KV in its blocks is of another numerics class, or was computed behind such KV."""
    has_lossy_kv: bool = False
    """Some of it came by a codec that loses, or was computed behind such KV."""
    is_mixed: bool = False
    """A token of it was made from KV of another class, or from lossy KV."""
    doomed: str | None = None
    """Finish reason to end with at the next step border: its blocks are in use by the running step."""
    doom_error: MeshError | None = None
    received_tokens: int = 0
    cached_tokens: int = 0
    computed_tokens: int = 0
    num_preemptions: int = 0
    ready_at: float = 0.0
    """When nothing but its turn was missing (arrival of KV, for a receiver)."""
    started_at: float | None = None
    first_token_at: float | None = None
    last_token_at: float = 0.0

    def __post_init__(self) -> None:
        wanted = self.params is not None and self.params.prompt_logprobs is not None
        # Who has output of it has the prompt's rows: they come before the first token.
        self.num_scored = 1 if wanted and not self.num_output_tokens else self.num_prompt_tokens

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def is_send(self) -> bool:
        return self.transfer is not None

    @property
    def has_impure_kv(self) -> bool:
        """A token that is made from its KV is not of this engine's class."""
        return self.has_foreign_kv or self.has_lossy_kv

    @property
    def needs_logits(self) -> bool:
        """Does it have to run once more where all of ``token_ids`` is computed already?"""
        return self.params is not None

    @property
    def samples(self) -> bool:
        """Does it want a token sampled once all of ``token_ids`` is computed?"""
        return self.params is not None and self.params.max_tokens > 0

    @property
    def num_positions(self) -> int:
        """That it needs room for: those of its tokens, and that of the one that it samples."""
        return len(self.token_ids) + (self.params is None or self.params.max_tokens > 0)

    @property
    def num_reusable(self) -> int:
        """Tokens whose KV a cache may have for it: of a row that is computed elsewhere there are no logits,
        which tell of the token behind it."""
        return len(self.token_ids) if self.is_scored else self.num_scored - 1

    @property
    def is_scored(self) -> bool:
        """No log-probability of its prompt is missing."""
        return self.num_scored >= self.num_prompt_tokens

    def score_of(self, start: int, end: int) -> ScoreSpec | None:
        """What is still wanted of the rows ``[start, end)`` of its tokens, if they are computed."""
        first, last = max(start, self.num_scored - 1), min(end, self.num_prompt_tokens - 1)
        if first >= last or self.params is None:
            return None
        targets = self.token_ids[first + 1 : last + 1]
        return ScoreSpec(first - start, targets, self.params.prompt_logprobs or 0)

    def take_scored(self, scored: Scored) -> None:
        """The next rows are in."""
        rows = PromptLogprobs(self.num_scored, scored.num_top, scored.rows)
        self.scored = rows if self.scored is None else self.scored.joined(rows)
        self.num_scored = rows.end

    def num_uncomputed(self) -> int:
        """Tokens still to be run before the next token can be sampled (at least one if it samples)."""
        left = self.num_tokens - self.num_computed
        return max(left, 1) if self.needs_logits else left

    def state_at(self, length: int) -> list[int]:
        """Blocks with its state behind ``length`` tokens, which a step computes or ``num_computed`` are."""
        return self.state_from if self.num_computed >= length else self.state_to

    def is_decoding(self) -> bool:
        """All but its newest token is computed and it has produced at least one."""
        num_tokens = len(self.token_ids)
        return num_tokens > self.num_prompt_tokens and num_tokens - self.num_computed <= 1
