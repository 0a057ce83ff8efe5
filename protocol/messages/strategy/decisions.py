"""Why a request went where it went: what its strategy saw, chose and said, for who asks (WIRE.md 6.6); and by
the same way how strategies fare (6.7).

Travels on the index's channels: an operator asks the index, it asks the routers that keep records, and hands
on what each of them says. Numbers, names and lengths: no prompt, no token, no attribute's value. Optional
words of authors (``Note``) are their own.
"""

from __future__ import annotations

import msgspec

from microserve.protocol.messages.engine import EngineLoad
from microserve.protocol.messages.kv.coding import Coding
from microserve.protocol.messages.kv.geometry import UNSAID, Geometry
from microserve.protocol.messages.numerics import Numerics
from microserve.protocol.messages.strategy.control import Scalar
from microserve.protocol.messages.strategy.scores import Score

MAX_PICKS = 32
"""Of one attempt that are kept, the first ones."""
MAX_NOTES = 16
"""Likewise."""
MAX_NOTE_CHARS = 200
"""Of a note's text, and of each value that is a text; what is longer is cut."""
MAX_NOTE_VALUES = 8
MAX_ATTEMPTS = 8
"""Of one request that are kept, the last ones."""
MAX_EXPLAINED_NBYTES = 2 << 20
"""Of all requests in one answer of a router."""
MAX_SCORES = 512
"""Likewise, of scores: those of versions first, then of engines by their requests."""


class _Message(msgspec.Struct, frozen=True, array_like=True):
    """Positional on the wire: fields are only ever appended, with defaults."""


# --- structures ------------------------------------------------------------------------------------


class EngineSeen(msgspec.Struct, frozen=True, array_like=True):
    """One engine that the strategy could have chosen, at the first ``pick`` of an attempt."""

    engine_id: str
    labels: list[str]
    """As that strategy saw them."""
    numerics: Numerics
    """Its class."""
    num_blocks: int
    own_tokens: int
    """Prompt tokens that this router had put there and that were not computed."""
    own_sequences: int
    own_transfer_tokens: int
    load: EngineLoad
    """Its last report."""
    load_age_s: float
    can: list[str] | None = None
    """As in ``EngineInfo``; None: it says none, or the router that remembers it is of before."""
    geometry: Geometry = UNSAID
    split_tokens: int = 1
    recompute_tokens: int = 0
    backend: str = ""
    cluster: str = ""


class Scored(msgspec.Struct, frozen=True, array_like=True):
    """What one scorer said."""

    name: str
    scores: list[float]
    """Of each candidate, as it gave them."""
    weight: float


class Pick(msgspec.Struct, frozen=True, array_like=True):
    """One choice of an engine among some."""

    at_s: float
    """Seconds after the request had come to the router."""
    label: str | None
    by: str
    """What counted first: ``load``, ``prefix``, ``cost`` or ``scorers``."""
    temperature: float
    candidates: list[str]
    """Engine ids; those below are of each, in this order."""
    costs: list[float]
    """The least wins; of equals the least load, then the lot."""
    uncached_tokens: list[int]
    sequences: list[int]
    chosen: str
    excluded: list[str]
    """What the strategy did not want; they are candidates where nobody else was left."""
    numerics: str
    """Candidates of other classes than this were left out for it; empty: none was."""
    scored: list[Scored]


class Note(msgspec.Struct, frozen=True, array_like=True):
    """What the strategy's author said (``mesh.note``)."""

    at_s: float
    text: str
    values: dict[str, Scalar]


class SendSeen(msgspec.Struct, frozen=True, array_like=True):
    """One ``remote_send`` that had something to send."""

    source: str
    target: str
    begin: int
    end: int
    coding: Coding | None = None
    """What became of the codec that was asked for; None: none was, or it did not come to its end."""


class Attempt(msgspec.Struct, frozen=True, array_like=True):
    """One run of a strategy for the request; after a failure there is another."""

    strategy: str
    """That ran: after a mistake, another one serves."""
    version: int
    at_s: float
    """Seconds after the request had come."""
    num_tokens: int
    """Of the prompt, with the output that was there already."""
    cached: dict[str, int]
    """Of these, what each engine was known to hold, if the strategy or an action asked."""
    engines: list[EngineSeen]
    picks: list[Pick]
    num_picks: int
    """All of them; only the first are kept."""
    notes: list[Note]
    num_notes: int
    sends: list[SendSeen]
    engine_id: str
    """Where it generates; empty: it did not come to that."""
    begin: int
    """First token that this engine computes itself, or has in its cache."""
    awaits_first: bool
    """A sender samples the first token."""


class Explanation(msgspec.Struct, frozen=True, array_like=True):
    """What a router remembers of one request."""

    request_id: str
    age_s: float
    """Seconds since it ended; 0: it still runs."""
    strategy: str
    """That it asked for."""
    version: int
    tenant: bool
    """It has one."""
    attributes: list[str]
    """Names; their values are not kept."""
    block_size: int
    num_prompt_tokens: int
    num_output_tokens: int
    max_tokens: int
    reason: str
    """As in ``Ended``; empty: it still runs."""
    code: str
    attempts: list[Attempt]
    num_attempts: int
    """All of them; only the last are kept."""
    is_cut: bool = False
    """It would have been too long: engines and candidates are left out."""


# --- service -> index ------------------------------------------------------------------------------


class Explain(_Message, frozen=True, tag=11):
    """What do routers remember of a request -> ``Asked``, then an ``Explained`` for each router of it."""

    call_id: int
    request_id: str
    """By any of its names (request_id.py)."""
    scores_of: str | None = None
    """Instead of a request: how this strategy fares, ``""`` all of them."""


class Answer(_Message, frozen=True, tag=12):
    """A router answers ``Question``."""

    question_id: int
    router_id: str
    found: list[Explanation]
    num_left_out: int
    """Found, and too much for one message."""
    num_kept: int
    """Requests that it remembers at all; 0 with ``router.record_requests`` 0."""
    scores: list[Score] = []
    """If it was asked for them; then the numbers above are of these."""


# --- index -> service ------------------------------------------------------------------------------


class Question(_Message, frozen=True, tag=13):
    """Index -> router: somebody asks -> ``Answer``."""

    question_id: int
    request_id: str
    scores_of: str | None = None


class Asked(_Message, frozen=True, tag=14):
    """These routers have been asked."""

    call_id: int
    routers: list[str]
    silent: list[str]
    """Routers that do not know the question (of before), or cannot be reached now."""


class Explained(_Message, frozen=True, tag=15):
    """What one of them answered."""

    call_id: int
    router_id: str
    found: list[Explanation]
    num_left_out: int
    num_kept: int
    scores: list[Score] = []
