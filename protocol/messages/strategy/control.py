"""The control topic: strategies and labels set on a living mesh, and which router runs what (WIRE.md 6.4).

Travels on the index's channels. A change gets a version from the index's log; a state is always whole, so a
receiver takes the highest version it has seen and loss, repetition and reordering do no harm.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from microserve.protocol.messages.host import UNSAID_HOST, HostFacts
from microserve.protocol.messages.strategy.scores import Ramp, RampState, Trial

Scalar = bool | int | float | str
"""Value of a strategy's parameter."""

MAX_SOURCE_NBYTES = 64 << 10
"""Longest source of one strategy."""
MAX_CONTROL_NBYTES = 4 << 20
"""Of all sources, parameters and labels of a state together: half of the longest message frame."""
MAX_CONTROL_ENTRIES = 64
"""Strategies under control at a time."""

MAX_LABELLED_ENGINES = 1024
"""Engines whose labels are set at a time."""
MAX_LABELS = 16
"""Of one engine."""
MAX_LABEL_CHARS = 64
ANY = "any"
"""What people write for an engine without labels, which serves every label; itself no label."""

PUBLISH, SET, PROMOTE, ROLLBACK, RETIRE = "publish", "set", "promote", "rollback", "retire"
SHARE, RAMP = "share", "ramp"
STRATEGY_KINDS = (PUBLISH, SET, PROMOTE, ROLLBACK, RETIRE, SHARE, RAMP)
LABEL, UNLABEL = LABEL_KINDS = "label", "unlabel"
KINDS = (*STRATEGY_KINDS, *LABEL_KINDS)


def fault_of_labels(labels: Sequence[str]) -> str:
    """What is wrong with them as the labels of one engine, in words; empty: nothing."""
    if len(labels) > MAX_LABELS:
        return f"{len(labels)} labels, at most {MAX_LABELS}"
    for label in labels:
        is_text = label.isprintable() and not any(letter.isspace() for letter in label)
        if not (is_text and 0 < len(label) <= MAX_LABEL_CHARS):
            return f"a label is 1 to {MAX_LABEL_CHARS} printable characters without spaces, not {label!r}"
        if label == ANY:
            return f"{ANY!r} stands for no label at all"
    return "" if len(set(labels)) == len(labels) else "a label twice"


class _Message(msgspec.Struct, frozen=True, array_like=True):
    """Positional on the wire: fields are only ever appended, with defaults."""


# --- structures ------------------------------------------------------------------------------------


class StrategyVersion(msgspec.Struct, frozen=True, array_like=True):
    """One version of one strategy; never changes."""

    version: int
    """Of the change that made it."""
    source: str
    """Python, a file or a package (strategy_source.py); empty: the strategy of that name that the router came
    with."""
    digest: str
    """SHA-256 of the source, hex."""
    parameters: dict[str, Scalar]
    max_ttft_s: float = 0.0
    """Taken back when more than a tenth of its requests wait longer for their first token; 0: no bound."""
    max_tpot_s: float = 0.0
    """As ``max_ttft_s``, seconds for each output token after the first."""
    sticky_by: str = ""
    """Of a canary or shadow: requests that have this attribute are chosen by its value, all of one value
    alike; empty, and where a request has it not: by their ids."""


class ControlEntry(msgspec.Struct, frozen=True, array_like=True):
    """What serves the requests that ask for one strategy."""

    strategy: str
    stable: StrategyVersion | None = None
    """None: nothing published; the strategy of that name that the router came with."""
    canary: StrategyVersion | None = None
    share: float = 0.0
    """Of the requests, those that the canary serves; chosen by their ids."""
    shadow: StrategyVersion | None = None
    """Decides about requests that others serve; its decisions are scored (``ShadowScore``)."""
    shadow_share: float = 0.0
    """Of the requests, those that it decides about."""
    ramp: Ramp | None = None
    """How the canary gets more of them; None: it keeps its share."""


class EngineLabels(msgspec.Struct, frozen=True, array_like=True):
    """Labels that an operator has given an engine; they go before those that it announces."""

    engine: str
    """Its id, in this life and the next."""
    labels: list[str]
    """Empty: it serves every label."""


class VersionFault(msgspec.Struct, frozen=True, array_like=True):
    """A router cannot run a version, or has seen it fail too often."""

    strategy: str
    version: int
    reason: str


class ShadowScore(msgspec.Struct, frozen=True, array_like=True):
    """What a shadow version would have done in one router, beside what was done: means over the same
    requests, by the router's cost model."""

    strategy: str
    version: int
    num_decisions: int
    num_errors: int
    """Decisions that were mistakes, or refusals; not in the means."""
    num_agreed: int
    """Decisions that decode on the same engine."""
    ttft_s: float
    """Predicted."""
    served_ttft_s: float
    """Predicted in the same way for what was done."""
    computed_tokens: float
    served_computed_tokens: float
    sent_tokens: float
    """KV that moves between engines."""
    served_sent_tokens: float


class StrategyServed(msgspec.Struct, frozen=True, array_like=True):
    """What one router serves under one name."""

    strategy: str
    version: int = 0
    """Of the stable version; 0: the router came with it."""
    suspended: list[int] = []
    """Versions of it that have hung there: another strategy serves in their place, as long as that lives."""


class RouterControl(msgspec.Struct, frozen=True, array_like=True):
    """How far one router is."""

    router_id: str
    version: int
    """Of the state that it has applied."""
    faults: list[VersionFault]
    shadows: list[ShadowScore] = []
    serves: list[StrategyServed] = []
    default_strategy: str = ""
    trials: list[Trial] = []
    gateways: list[str] = []
    """URLs, as they say."""
    software: str = ""
    """Its version."""
    host: HostFacts = UNSAID_HOST
    """Of its process and machine, as it last said."""
    clock_off_s: float = 0.0
    """Its clock less the index's, where ``host`` says one: the most of its last few ``Watch``, for what they
    took on their way makes it less."""


class ControlRecord(msgspec.Struct, frozen=True, array_like=True):
    """One change, as the log keeps it."""

    version: int
    at: float
    """Wall clock, seconds since 1970."""
    who: str
    """CURVE key (Z85) of the publisher, ``local`` without CURVE, or ``router <id>``."""
    kind: str
    strategy: str
    digest: str
    parameters: dict[str, Scalar]
    share: float
    reason: str
    engine: str = ""
    labels: list[str] = []
    shadow: bool = False
    ramp: Ramp | None = None


# --- service -> index ------------------------------------------------------------------------------


class Change(_Message, frozen=True, tag=7):
    """Change what is served -> ``Changed``. Idempotent by ``change_id``."""

    call_id: int
    change_id: str
    """Random; the same change repeated is no second one."""
    kind: str
    strategy: str
    source: str = ""
    parameters: dict[str, Scalar] = {}
    share: float = 1.0
    """``publish``: below 1 it is a canary; of a shadow, the requests that it decides about. ``share``: what
    the canary has from now on, below 1."""
    version: int = 0
    """``rollback``: this one, in force or to be restored; 0: whichever is in force."""
    shadow: bool = False
    """``publish`` as a shadow; ``promote`` or ``rollback`` the shadow."""
    reason: str = ""
    max_ttft_s: float = 0.0
    max_tpot_s: float = 0.0
    """``publish``: bounds of the version."""
    engine: str = ""
    """``label`` and ``unlabel``: which; it need not be a member."""
    labels: list[str] = []
    """``label``: instead of those that it announces; empty: it serves every label."""
    sticky_by: str = ""
    """``publish`` of a canary or shadow: as in the version that it makes."""
    ramp: Ramp | None = None
    """``publish`` of a canary, and ``ramp``: how it goes on; None: with the share that it has."""


class ControlStatus(_Message, frozen=True, tag=8):
    """-> ``ControlReport``."""

    call_id: int


class ControlHistory(_Message, frozen=True, tag=9):
    """-> ``ControlRecords``, the newest first."""

    call_id: int
    strategy: str = ""
    """Empty: of all."""
    limit: int = 100


# --- index -> service ------------------------------------------------------------------------------


class Changed(_Message, frozen=True, tag=7):
    """The change is in the log."""

    call_id: int
    version: int


class ControlState(_Message, frozen=True, tag=8):
    """Everything that is under control, whole."""

    version: int
    entries: list[ControlEntry]
    labels: list[EngineLabels] = []
    """By engine id; the others have those that they announce."""


class ControlReport(_Message, frozen=True, tag=9):
    call_id: int
    state: ControlState
    routers: list[RouterControl]
    durable: bool
    """The log survives the index."""
    ramps: list[RampState] = []


class ControlRecords(_Message, frozen=True, tag=10):
    call_id: int
    records: list[ControlRecord]
