"""Gateway <-> router: whole requests and their token streams (WIRE.md 5)."""

from __future__ import annotations

import msgspec

from microserve.protocol.messages.adapter import Adapter
from microserve.protocol.messages.engine import TokenLogprob, Usage
from microserve.protocol.messages.numerics import UNKNOWN, Numerics
from microserve.protocol.messages.request.prompt_logprobs import PromptLogprobs
from microserve.protocol.messages.request.sampling import SamplingParams


class _Message(msgspec.Struct, frozen=True, array_like=True):
    """Positional on the wire: fields are only ever appended, with defaults."""


# --- gateway -> router -----------------------------------------------------------------------------


class GatewayHello(_Message, frozen=True, tag=1):
    """First message of a connection -> ``RouterWelcome``."""

    gateway_id: str
    incarnation: int
    credit: int
    """``Stream`` messages that the router may send before more ``StreamCredit`` comes."""
    url: str = ""
    """Where it serves HTTP, as others reach it; empty: only from its own host, or not said."""


class Generate(_Message, frozen=True, tag=2):
    """Serve one sequence; one bulk frame holds the prompt's tokens. Answered by a stream of ``Output``."""

    request_id: str
    model: str
    sampling: SamplingParams
    ttl_s: float
    strategy: str | None = None
    """None: the router's default."""
    salt: str = ""
    num_output_tokens: int = 0
    """The last so many of the tokens are output that the client has: another router served it before. The
    stream goes on behind them; offsets count from the prompt's end, as ever."""
    tenant: str = ""
    """Whose request it is: tenants share the mesh fairly. Empty: nobody's in particular."""
    priority: int = 0
    """Of requests that wait, those of a higher one go first."""
    revision: str = ""
    """Of the model that made this output; empty: not said. Another one does not go on with it."""
    numerics: Numerics = UNKNOWN
    """In which class this output was made."""
    attributes: dict[str, str] = {}
    """By name (request/attributes.py): whatever the gateway lets strategies know of who asks."""
    adapter: str = ""
    """Name of the model's adapter that is to answer; empty: the model alone."""
    adapter_revision: str = ""
    """Of the adapter that made this output; as ``revision``."""
    traceparent: str = ""
    """Where the request stands in a trace (tracing/traceparent.py); empty, or no valid one: in none."""
    exact: bool | None = None
    """May its KV come by a codec that loses something? True: never, whatever its strategy says; False: it
    may; None: its strategy says."""


class Cancel(_Message, frozen=True, tag=3):
    """The client is gone. Answered by the stream's end, reason ``abort``; unknown ids are fine."""

    request_id: str


class GatewayPing(_Message, frozen=True, tag=4):
    """Liveness of the gateway and of every request it owns; not answered."""

    incarnation: int
    next_s: float = 0.0
    """The next one comes in so long, for nothing is under way; 0: in an interval."""


class StreamCredit(_Message, frozen=True, tag=5):
    messages: int


RouterRequest = GatewayHello | Generate | Cancel | GatewayPing | StreamCredit


# --- router -> gateway -----------------------------------------------------------------------------


class Phases(msgspec.Struct, frozen=True, array_like=True):
    """Consecutive durations of one request inside the router, in seconds; they add up to ``total_s``."""

    total_s: float = 0.0
    routed_s: float = 0.0
    """Received until the first action was sent."""
    granted_s: float = 0.0
    """Until the receiver's grant was in."""
    prefilled_s: float = 0.0
    """Until the sender had computed."""
    transferred_s: float = 0.0
    """Until the last byte was put."""
    admitted_s: float = 0.0
    """Until the decode engine ran it."""
    first_token_s: float = 0.0
    decoded_s: float = 0.0


ROUTER_PHASES = tuple(name.removesuffix("_s") for name in Phases.__struct_fields__[1:-1])
"""In order, up to the first token."""
PHASES = ("queued", "tokenised", *ROUTER_PHASES, "decoded")
"""In order; the canonical line has each as ``<phase>_s``, and they add up to ``wall_s``."""


class Ended(msgspec.Struct, frozen=True, array_like=True):
    """The end of a request: exactly one for each ``Generate``, whatever happened."""

    reason: str
    """``stop``, ``length``, ``abort`` or ``error``."""
    usage: Usage
    phases: Phases
    strategy: str
    engines: list[str]
    """Engines that took part, in order of first use."""
    code: str = ""
    detail: str = ""
    field: str | None = None
    retry_after_s: float = 0.0
    stop_token_id: int | None = None
    strategy_version: int = 0
    """The published version that it began with; 0: the strategy that the router came with."""
    numerics: Numerics = UNKNOWN
    """In which class the whole answer was made; empty without output, and where an engine says none."""
    why: str = ""
    """How its engines were chosen, in a line for people; empty: the router records nothing."""
    capped_to: int = 0
    """Most output tokens by the word of its strategy, where that is less than was asked for; 0: it is not."""
    share: str = ""
    """As what its version served it: ``stable`` or ``canary``; empty: it was not admitted."""
    num_moves: int = 0
    """Times that it went to another engine in its midst, with its KV."""
    alone: str = ""
    """Why one engine alone served it, whatever its strategy says: ``prompt_logprobs``, or the code of what
    went wrong. Empty: its strategy served it."""
    heaps: list[str] = []
    """Kinds of heap and door that its KV was sent through, in order of first use."""


class Served(msgspec.Struct, frozen=True, array_like=True):
    """By what a request is served, as its first tokens come."""

    strategy: str
    strategy_version: int
    engines: list[str]
    """Those that took part by then; as in ``Ended``."""


class Output(msgspec.Struct, frozen=True, array_like=True):
    """New tokens of one request; offsets as in ``actions.Delta``."""

    request_id: str
    offset: int
    token_ids: list[int]
    logprobs: list[TokenLogprob] = []
    ended: Ended | None = None
    numerics: Numerics | None = None
    """In which class the answer up to here was made: with the first tokens from a router, and whenever it is
    another than before."""
    served: Served | None = None
    """With the first tokens from a router."""
    prompt: PromptLogprobs | None = None
    """As in ``actions.Delta``."""


class RouterWelcome(_Message, frozen=True, tag=1):
    router_id: str
    incarnation: int
    model: str
    """Empty until the first engine is known."""
    max_model_len: int
    vocab_size: int
    num_engines: int
    strategies: list[str]
    default_strategy: str
    eos_token_ids: list[int] = []
    """Ids that end a sequence and carry no text; empty until the first engine is known."""
    revision: str = ""
    """Of the model that is served; as ``EngineInfo.revision``."""
    paced: bool = False
    """It knows ``GatewayPing.next_s``."""
    adapters: list[Adapter] = []
    """Of the engines that are here, each once."""


class Stream(_Message, frozen=True, tag=2):
    """One message per wake-up: new tokens of every request of this gateway. Costs one credit."""

    outputs: list[Output]


class RouterHeartbeat(_Message, frozen=True, tag=3):
    """Every interval, to each gateway."""

    incarnation: int
    num_engines: int
    num_requests: int
    max_requests: int
    model: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: list[int] = []
    revision: str = ""
    """Both as in ``RouterWelcome``."""
    next_s: float = 0.0
    """The next one comes in so long, for nothing is under way; 0: in an interval."""
    num_running: int = 0
    """Sequences in the engines' batches, all routers' together, and those that wait there."""
    num_waiting: int = 0
    kv_usage: float = 0.0
    """Of all the engines' blocks, what is in use: 0 to 1."""
    adapters: list[Adapter] = []
    """As in ``RouterWelcome``."""


class RouterFailed(_Message, frozen=True, tag=4):
    """A message could not be read at all (no request to answer)."""

    code: str
    detail: str


RouterReply = RouterWelcome | Stream | RouterHeartbeat | RouterFailed
