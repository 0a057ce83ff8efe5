"""Any service <-> index: who is in the mesh, and who holds which prefix (WIRE.md 6)."""

from __future__ import annotations

import msgspec

from microserve.protocol.messages import world as worlds
from microserve.protocol.messages.check import PairCheck, Suspect
from microserve.protocol.messages.engine import EngineInfo, EngineLoad
from microserve.protocol.messages.host import UNSAID_HOST, HostFacts
from microserve.protocol.messages.strategy import control, decisions
from microserve.protocol.messages.strategy.scores import Trial


class _Message(msgspec.Struct, frozen=True, array_like=True):
    """Positional on the wire: fields are only ever appended, with defaults."""


# --- service -> index ------------------------------------------------------------------------------


class Register(_Message, frozen=True, tag=1):
    """An engine is ready -> ``Registered``. A newer incarnation replaces an older one of the same id."""

    call_id: int
    info: EngineInfo


class Beat(_Message, frozen=True, tag=2):
    """An engine's heartbeat, every interval; answered by ``Unknown`` if the index does not know it."""

    engine_id: str
    incarnation: int
    load: EngineLoad
    next_s: float = 0.0
    """The next one comes in so long, for nothing is under way; 0: in an interval."""


class Deregister(_Message, frozen=True, tag=3):
    """A clean leave; not answered."""

    engine_id: str
    incarnation: int


class Watch(_Message, frozen=True, tag=4):
    """Send ``Members`` now and at every change, and at least every interval, until the peer falls silent.

    Repeated by the watcher every interval: the repetition is its heartbeat."""

    watcher_id: str
    control_version: int = -1
    """Of the control state that it has applied; below the index's: ``ControlState`` comes too. -1: it wants
    none."""
    faults: list[control.VersionFault] = []
    """Versions that it cannot run, repeated as long as the state has them; and those that failed here, also
    when others are in force by now: they are not to come back."""
    shadows: list[control.ShadowScore] = []
    """Of the shadow versions that it runs, since it applied them."""
    serves: list[control.StrategyServed] = []
    """Every name that requests may ask for."""
    default_strategy: str = ""
    """Of requests that name none."""
    answers: bool = False
    """It knows ``Question``."""
    next_s: float = 0.0
    """The next one comes in so long, for nothing is under way; 0: in an interval."""
    trials: list[Trial] = []
    """Of the canaries that it runs, since they have their shares."""
    gateways: list[str] = []
    """URLs of the gateways that are connected to it, as they say."""
    version: str = ""
    """Of its software."""
    host: HostFacts = UNSAID_HOST
    """Of its process and machine."""
    checks: list[PairCheck] = []
    """The last that it made, repeated: those that found a difference, and the newest."""


class Lookup(_Message, frozen=True, tag=5):
    """Which engines hold how much of a prompt (bulk frame: tokens) -> ``Matches``."""

    call_id: int
    salt: str = ""
    adapter: str = ""
    """Of the engines' adapters; empty: KV of the model alone."""


class IndexStats(_Message, frozen=True, tag=6):
    """-> ``IndexReport``."""

    call_id: int


IndexRequest = (
    Register
    | Beat
    | Deregister
    | Watch
    | Lookup
    | IndexStats
    | control.Change
    | control.ControlStatus
    | control.ControlHistory
    | worlds.JoinWorld
    | decisions.Explain
    | decisions.Answer
)


# --- index -> service ------------------------------------------------------------------------------


class Registered(_Message, frozen=True, tag=1):
    call_id: int
    index_incarnation: int
    paced: bool = False
    """It knows ``Beat.next_s``."""


class Unknown(_Message, frozen=True, tag=2):
    """The index has restarted or has expired this engine: register again."""

    engine_id: str


class Member(msgspec.Struct, frozen=True, array_like=True):
    info: EngineInfo
    load: EngineLoad


class Members(_Message, frozen=True, tag=3):
    """The whole membership; versions of one index incarnation only grow."""

    index_incarnation: int
    version: int
    members: list[Member]
    paced: bool = False
    """It knows ``Watch.next_s``."""
    suspects: list[Suspect] = []
    """Between which no KV goes, because of what routers' checks have found."""
    routers: list[str] = []
    """By name, those that watch; they share the checks among them. Empty: it knows of no checks."""


class Matches(_Message, frozen=True, tag=4):
    call_id: int
    matched: dict[str, int]
    """Engine id -> tokens of the prompt that it holds, from the start."""


class MissingEngine(msgspec.Struct, frozen=True, array_like=True):
    """An engine that asks to be a member and is refused, or that was one and was lost."""

    engine_id: str
    incarnation: int
    address: str
    """Of its actions, as it says."""
    code: str
    """Error code of the refusal; ``engine_lost`` without a field: it was lost."""
    field: str = ""
    """What does not fit."""
    detail: str = ""
    age_s: float = 0.0
    """Since it was last refused, or was lost."""


class IndexReport(_Message, frozen=True, tag=5):
    call_id: int
    num_engines: int
    num_blocks: int
    nbytes: int
    counters: dict[str, int]
    missing: list[MissingEngine] = []
    """The refused of the last minute and the lost of the last hour."""
    refused_keys: dict[str, float] = {}
    """Public keys (Z85) that were turned away at the door, and the seconds since."""
    host: HostFacts = UNSAID_HOST
    """Of the index's process and machine."""
    checks: list[PairCheck] = []
    """The last of each pair of members: those that found a difference first, then the newest."""


class IndexFailed(_Message, frozen=True, tag=6):
    call_id: int
    code: str
    detail: str
    field: str | None = None


IndexReply = (
    Registered
    | Unknown
    | Members
    | Matches
    | IndexReport
    | IndexFailed
    | control.Changed
    | control.ControlState
    | control.ControlReport
    | control.ControlRecords
    | worlds.WorldJoined
    | worlds.WorldWaiting
    | decisions.Question
    | decisions.Asked
    | decisions.Explained
)
