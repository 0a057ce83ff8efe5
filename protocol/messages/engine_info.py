"""What an engine says of itself in its hello, to routers and to the index (WIRE.md 4.3).

Plain data. What it does besides the plain ``StartGenerate`` is said here and nowhere assumed of a backend.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import msgspec

from microserve.protocol.messages.adapter import Adapter, adapter_named
from microserve.protocol.messages.kv.geometry import UNSAID, Geometry, differing_field
from microserve.protocol.messages.numerics import UNKNOWN, Numerics
from microserve.protocol.types import NO_KEY

PREP_RECV: Final = "prep_recv"
REMOTE_SEND: Final = "remote_send"
COMMIT: Final = "commit"
FIRST_TOKEN: Final = "first_token"
EARLY_START: Final = "early_start"
PROMPT_LOGPROBS: Final = "prompt_logprobs"
GRAMMAR: Final = "grammar"
LORA: Final = "lora"
SNAPSHOT: Final = "snapshot"
ABILITIES: Final = (
    PREP_RECV,
    REMOTE_SEND,
    COMMIT,
    FIRST_TOKEN,
    EARLY_START,
    PROMPT_LOGPROBS,
    GRAMMAR,
    LORA,
    SNAPSHOT,
)
"""Names in ``EngineInfo.can``: what an engine may have besides ``StartGenerate`` without a grant."""


class EngineInfo(msgspec.Struct, frozen=True):
    """What an engine is; fixed for its life. Compared at the door: a mismatch is a clear refusal."""

    engine_id: str
    incarnation: int
    address: str
    """ZeroMQ address of its action socket; empty of one that only publishes KV events."""
    events_address: str
    replay_address: str
    model: str
    labels: list[str]
    """Operator's labels (``prefill``, ``decode``, ...); an engine without any serves every label."""
    block_size: int
    num_blocks: int
    num_layers: int
    max_model_len: int
    vocab_size: int
    eos_token_ids: list[int]
    layout_hash: str
    heap: str
    wire_version: int
    curve_key: str = ""
    """Public CURVE key of its sockets, Z85; empty without CURVE."""
    revision: str = ""
    """Digest of the model that it has loaded: what the name stands for. Empty of an engine that says none."""
    numerics: Numerics = UNKNOWN
    """In which class it computes; empty of an engine that says none."""
    backend: str = ""
    """What computes: ``native``, ``vllm``, ``vllm-serve``; for people. Empty: not said."""
    backend_version: str = ""
    can: list[str] | None = None
    """Names of ``ABILITIES`` that it has; None, of an older engine: all of them. Unknown ones are fine."""
    geometry: Geometry = UNSAID
    """Of its KV: what must be equal before a byte moves."""
    heaps: list[str] = []
    """Kinds of heap through which it can be written to, best first; empty: ``heap`` alone."""
    split_tokens: int = 1
    """Sends from it meet at multiples of so many tokens; the last one ends where the grant does."""
    recompute_tokens: int = 0
    """At most so many of the last tokens of a received prefix are computed again by it."""
    events_open: bool = False
    """Its KV events and their replay are without keys, whatever its other sockets have."""
    adapters: list[Adapter] = []
    """That requests may name (``lora`` in ``can``); empty of an engine that has none."""
    cluster: str = ""
    """In which it stands; engines without one are of one together."""

    def does(self, ability: str) -> bool:
        """Has it this one of ``ABILITIES``?"""
        return self.can is None or ability in self.can

    def has_adapter(self, name: str, revision: str = "") -> bool:
        """May a request name it here? Empty: the model alone, which each has. ``revision``: just that one."""
        known = adapter_named(name, self.adapters) if name else None
        return not name or (known is not None and revision in ("", known.revision))

    @property
    def only_publishes(self) -> bool:
        """Nothing can be asked of it: other people's engine, whose KV events are followed and no more."""
        return not self.address and self.can == []

    @property
    def events_key(self) -> str:
        """Public key that its KV events and their replay are to have."""
        return NO_KEY if self.events_open else self.curve_key

    @property
    def exchanges_kv(self) -> bool:
        """Does KV ever go there, or come from there?"""
        return self.does(PREP_RECV) or self.does(REMOTE_SEND)

    def is_stranger(self, other: EngineInfo) -> bool:
        """Both exchange KV, and never with each other: one is of a release that says no revision yet."""
        return self.exchanges_kv and other.exchanges_kv and bool(self.revision) != bool(other.revision)

    @property
    def all_heaps(self) -> list[str]:
        """Kinds through which it can be written to, best first; none of one that receives nothing."""
        return self.heaps or ([self.heap] if self.heap else [])


class Disagreement(NamedTuple):
    """In what two engines of one model should agree and do not."""

    field: str
    mine: object
    theirs: object


def disagreement(mine: EngineInfo, theirs: EngineInfo) -> Disagreement | None:
    """Why these two cannot serve one model together; None: they can. Engines between which no KV ever goes
    need not have the same blocks, and one of the two need not say a revision: so a release that says none
    serves beside one that does while a mesh is renewed."""
    exchange = mine.exchanges_kv and theirs.exchanges_kv and not mine.is_stranger(theirs)
    # Geometry first: another dtype is another revision as well, and says more.
    if exchange and (field := differing_field(mine.geometry, theirs.geometry)):
        return Disagreement(field, getattr(mine.geometry, field), getattr(theirs.geometry, field))
    fields = ["revision"] if exchange or (mine.revision and theirs.revision) else []
    fields += ["block_size", "layout_hash"] if exchange else []
    for field in (*fields, "vocab_size", "eos_token_ids"):
        if (own := getattr(mine, field)) != (other := getattr(theirs, field)):
            return Disagreement(field, own, other)
    for adapter in mine.adapters:  # each has its own ones, but what a name stands for is one thing
        namesake = adapter_named(adapter.name, theirs.adapters)
        if namesake is not None and namesake != adapter:
            return Disagreement("adapters", str(adapter), str(namesake))
    return None
