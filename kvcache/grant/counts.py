"""How many grants there are, and of what kind. Plain data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GrantCounts:
    num_open: int
    num_sealed: int
    num_quarantined: int
    num_quarantined_blocks: int
    num_free_slots: int
    oldest_quarantine_s: float
    num_live_blocks: int
    """Of open and sealed grants, without those that were matched."""
    oldest_open_s: float
