"""Router <-> engine: the three actions and the verbs beside them (WIRE.md 4).

Intervals are half-open over prompt tokens; a negative bound counts from the prompt's end and
``end == len(prompt)`` is legal everywhere. Prompt tokens travel once per engine and request, as one raw
little-endian u32 bulk frame behind the first message that needs them; later messages name the request.
Every message with a ``call_id`` is answered by exactly one reply with that ``call_id``, or by ``Failed``.
"""

from __future__ import annotations

import msgspec

from microserve.protocol.messages.engine_info import EngineInfo as EngineInfo  # noqa: PLC0414 - a message's part
from microserve.protocol.messages.engine_load import EngineLoad as EngineLoad  # noqa: PLC0414
from microserve.protocol.messages.engine_load import LinkGoodput as LinkGoodput  # noqa: PLC0414
from microserve.protocol.messages.host import UNSAID_HOST, HostFacts
from microserve.protocol.messages.kv.coding import Coding
from microserve.protocol.messages.kv.grant import Grant
from microserve.protocol.messages.numerics import UNKNOWN, Numerics
from microserve.protocol.messages.request.prompt_logprobs import PromptLogprobs
from microserve.protocol.messages.request.sampling import SamplingParams


class _Message(msgspec.Struct, frozen=True, array_like=True, omit_defaults=False):
    """Positional on the wire: fields are only ever appended, with defaults."""


# --- router -> engine ------------------------------------------------------------------------------


class Hello(_Message, frozen=True, tag=1):
    """First message of a connection; the engine answers ``Welcome`` or ``Failed`` and forgets older lives."""

    call_id: int
    router_id: str
    incarnation: int
    credit: int
    """``Deltas`` messages that the engine may send before more ``Credit`` comes."""


class PrepRecv(_Message, frozen=True, tag=2):
    """Match ``tokens[:end]``, allocate and pin the rest -> ``Granted``."""

    call_id: int
    request_id: str
    end: int
    ttl_s: float
    """Seconds that the request may still take; relative, so clocks need not agree."""
    salt: str = ""
    """Prefix cache namespace of a tenant."""
    adapter: str = ""
    """Name of the adapter with which all of the request is computed; empty: the model alone."""
    traceparent: str = ""
    """Where this action stands in a trace (tracing/traceparent.py); empty, or no valid one: in none."""
    may_lose: bool = False
    """The KV may come by a codec that loses some of it; else the engine refuses what does."""


class RemoteSend(_Message, frozen=True, tag=3):
    """Obtain KV of ``tokens[:end]`` and put ``[begin, end)`` into the grant's blocks -> ``Sent``."""

    call_id: int
    request_id: str
    begin: int
    end: int
    grant: Grant
    lane: int
    """Which of the grant's writer lanes is ours; the router hands out each lane once."""
    ttl_s: float
    sampling: SamplingParams | None = None
    """With ``end == len(prompt)``: sample the first token as well and leave it in the lane."""
    salt: str = ""
    num_output_tokens: int = 0
    """As in ``StartGenerate``: the last so many of the tokens are output (they matter to sampling)."""
    adapter: str = ""
    """As in ``PrepRecv``, and of the same revision as the grant's."""
    traceparent: str = ""
    """As in ``PrepRecv``."""
    codec: str = ""
    """Name of the profile (kvcache/codec) to send by; ``auto``: the engine chooses. Empty: as it is."""
    may_lose: bool = False
    """As in ``PrepRecv``: the profile may be one that loses."""
    within_s: float = 0.0
    """Time allowed for encoding, sending and decoding, by which ``auto`` chooses; 0: as soon as it can be."""


class StartGenerate(_Message, frozen=True, tag=4):
    """Compute ``tokens[begin:]`` and generate -> ``Accepted``, then deltas until ``Finished``."""

    call_id: int
    request_id: str
    begin: int
    sampling: SamplingParams
    ttl_s: float
    grant_id: str | None = None
    """The grant that this engine gave for the request, if KV was or is being sent to it."""
    await_first: bool = False
    """The sender samples the next token (``begin == len(prompt)``): wait for it in the grant's lane."""
    num_output_tokens: int = 0
    """The last so many of the tokens are output already delivered (a continued stream)."""
    salt: str = ""
    numerics: str = ""
    """Name of the class in which the grant's KV is computed; ``mixed``: in several. Empty: not said, or
    nothing is sent."""
    adapter: str = ""
    """As in ``PrepRecv``."""
    traceparent: str = ""
    """As in ``PrepRecv``."""


class Commit(_Message, frozen=True, tag=5):
    """When all of the grant's KV is in, make it prefix cache without generating -> ``Committed``."""

    call_id: int
    request_id: str
    grant_id: str
    ttl_s: float
    numerics: str = ""
    """As in ``StartGenerate``."""


class Abort(_Message, frozen=True, tag=6):
    """End everything under the request id, in any phase -> ``Done``. Unknown ids are fine."""

    call_id: int
    request_id: str


class Release(_Message, frozen=True, tag=7):
    """Give a grant back unused -> ``Done``. Unknown ids are fine."""

    call_id: int
    request_id: str
    grant_id: str


class Drain(_Message, frozen=True, tag=8):
    """Leave the mesh -> ``Done`` at once."""

    call_id: int
    incarnation: int = 0
    """The life that shall leave; another one refuses."""


class Stats(_Message, frozen=True, tag=9):
    """-> ``EngineStats``."""

    call_id: int


class Snapshot(_Message, frozen=True, tag=10):
    """The prefix cache as events would have built it -> ``SnapshotReply`` and bulk (kv/kv_events.py)."""

    call_id: int


class Ping(_Message, frozen=True, tag=11):
    """Liveness of the router and of every request that it owns; not answered."""

    incarnation: int
    next_s: float = 0.0
    """The next one comes in so long, for nothing is under way; 0: in an interval."""


class Credit(_Message, frozen=True, tag=12):
    """The router has taken this many more ``Deltas``; not answered."""

    messages: int


EngineRequest = (
    Hello
    | PrepRecv
    | RemoteSend
    | StartGenerate
    | Commit
    | Abort
    | Release
    | Drain
    | Stats
    | Snapshot
    | Ping
    | Credit
)


# --- engine -> router ------------------------------------------------------------------------------


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Log-probability of a chosen token and of the likeliest alternatives, from the raw logits."""

    logprob: float
    top: list[tuple[int, float]] = []


class Timings(msgspec.Struct, frozen=True, array_like=True):
    """Durations inside one engine, in seconds by its own monotonic clock."""

    queued_s: float = 0.0
    """Accepted until first scheduled (for a receiver: after the KV was in)."""
    arrival_s: float = 0.0
    """Waiting for KV to arrive."""
    prefill_s: float = 0.0
    decode_s: float = 0.0
    transfer_s: float = 0.0
    """Time spent in puts."""


class Usage(msgspec.Struct, frozen=True, array_like=True):
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Found in this engine's prefix cache."""
    received_tokens: int = 0
    """KV that another engine computed."""
    output_tokens: int = 0
    num_preemptions: int = 0


class Finished(msgspec.Struct, frozen=True, array_like=True):
    """The end of a stream: exactly one per accepted ``StartGenerate`` that is not aborted."""

    reason: str
    """``stop`` (end of sequence or stop token), ``length``, ``abort`` or ``error``."""
    usage: Usage
    timings: Timings
    code: str = ""
    """Error code, with reason ``error``."""
    detail: str = ""
    stop_token_id: int | None = None
    """The token that ended it; it is the last output token and carries no text."""
    numerics: Numerics = UNKNOWN
    """Of all KV that the tokens of this engine were made from."""


class Delta(msgspec.Struct, frozen=True, array_like=True):
    """New tokens of one request since its last delta."""

    request_id: str
    offset: int
    """Output tokens before these; a repeated delta is dropped, a gap is an error."""
    token_ids: list[int]
    logprobs: list[TokenLogprob] = []
    """As many as ``token_ids`` if the request asked for them, else none."""
    finished: Finished | None = None
    prompt: PromptLogprobs | None = None
    """If the request asked for them: the next ones, all of them before the first token or with it."""


class Welcome(_Message, frozen=True, tag=1):
    call_id: int
    info: EngineInfo
    load: EngineLoad
    paced: bool = False
    """It knows ``Ping.next_s``."""


class Granted(_Message, frozen=True, tag=2):
    call_id: int
    grant: Grant


class Sent(_Message, frozen=True, tag=3):
    """Every byte of ``[begin, end)`` has been put and signalled."""

    call_id: int
    request_id: str
    computed: int
    """Tokens that the sender prefilled."""
    cached: int
    """Tokens that it had in its prefix cache."""
    sent: int
    """Tokens whose KV was put: ``[max(begin, matched), end)``."""
    nbytes: int
    timings: Timings
    first_token: int | None = None
    first_logprob: TokenLogprob | None = None
    heap: str = ""
    """Kind of the heap that it was put through, as in ``HeapAddress.kind``; empty: nothing was put."""
    coding: Coding | None = None
    """What became of ``RemoteSend.codec``; None: none was asked for."""


class Accepted(_Message, frozen=True, tag=4):
    call_id: int


class Deltas(_Message, frozen=True, tag=5):
    """One message a step: new tokens of every stream that this router has here. Costs one credit."""

    deltas: list[Delta]


class Committed(_Message, frozen=True, tag=6):
    call_id: int
    num_tokens: int
    """Tokens that are prefix cache now (whole blocks)."""


class Done(_Message, frozen=True, tag=7):
    call_id: int


class EngineStats(_Message, frozen=True, tag=8):
    call_id: int
    load: EngineLoad
    counters: dict[str, int]
    host: HostFacts = UNSAID_HOST
    """Of the engine's process and machine."""


class SnapshotReply(_Message, frozen=True, tag=9):
    """Bulk frame 1: msgpack ``KVEventBatch`` whose events rebuild the cache as of ``seq``."""

    call_id: int
    epoch: int
    """The engine's incarnation."""
    seq: int
    """The first live event batch that is not in the snapshot."""


class Heartbeat(_Message, frozen=True, tag=10):
    """Not asked for; sent every interval to each router. A dead or stuck engine falls silent."""

    incarnation: int
    load: EngineLoad
    next_s: float = 0.0
    """The next one comes in so long, for nothing is under way; 0: in an interval."""


class Failed(_Message, frozen=True, tag=11):
    """The call ``call_id`` failed; ``code`` is from errors.py. ``call_id`` 0: no call could be read."""

    call_id: int
    code: str
    detail: str
    field: str | None = None
    retry_after_s: float = 0.0


EngineReply = (
    Welcome
    | Granted
    | Sent
    | Accepted
    | Deltas
    | Committed
    | Done
    | EngineStats
    | SnapshotReply
    | Heartbeat
    | Failed
)
