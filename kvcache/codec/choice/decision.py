"""What is asked of a controller for one transfer, and what it answers. Plain data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from microserve.kvcache.codec.profile import NONE, Profile


@dataclass(frozen=True, slots=True)
class Context:
    """One transfer, as its sender knows it before the first byte."""

    nbytes: int
    """Raw bytes of its KV."""
    num_payloads: int = 1
    """In how many it is encoded: layers times chunks."""
    link_bytes_per_s: float = 0.0
    """Goodput of the link; 0: not known yet."""
    slo_s: float = math.inf
    """Time allowed."""
    quality_floor: float = 0.0
    """Least ``Quality.score`` that will do."""
    may_lose: bool = False
    codecs: frozenset[str] = frozenset()
    """What the receiver decodes, as ``kv1:rans``."""
    decode_queued_s: float = 0.0
    """Until its decoder is free."""
    decode_s_per_byte: float = 0.0
    """As it has lately seen, per raw byte; 0: not said. A decoder that others use too is slower than
    alone."""
    is_overlapped: bool = False
    """Layer follows layer: while one is decoded, the next is on its way and the one behind it encoded."""


class Reason(StrEnum):
    """Why a profile was chosen. Bounded: a label of metrics."""

    ASKED = "asked"
    """By its name, or nothing was asked for."""
    REFUSED = "refused"
    """The one asked for may not be used here: raw."""
    UNKNOWN_LINK = "unknown_link"
    """Nothing is known of the link yet: raw, which measures it."""
    MODEL = "model"
    """The prediction's best, and what was seen says nothing else."""
    LEARNED = "learned"
    """Another one than the prediction's best, by what was seen."""
    EXPLORED = "explored"
    """At random, to see whether it is still so."""
    NONE_FEASIBLE = "none_feasible"
    """Whatever was measured would miss the time allowed: raw."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What is done with a transfer; :meth:`Controller.observe` takes it back with how long it took."""

    profile: Profile = NONE
    reason: Reason = Reason.ASKED
    predicted_s: float = 0.0
    """From the first byte encoded to the last one decoded, by the measured costs alone; 0: not known."""
    expected_s: float = 0.0
    """Likewise, with what was seen of late; equals ``predicted_s`` where nothing was."""
    detail: str = ""
    """Of a refusal: what is in the way, in words."""
    slo_s: float = math.inf
    cell: tuple[frozenset[int], str] | None = None
    """Where what is seen is remembered; None: it is not."""

    @property
    def is_encoded(self) -> bool:
        return self.profile.name != NONE.name
