"""What a run is asked for: plain data."""

from __future__ import annotations

import msgspec

BAYES, EXHAUSTIVE, LOT = "bayes", "exhaustive", "random"


class Task(msgspec.Struct, kw_only=True, frozen=True):
    file: str
    out: str
    as_chat: bool = True
    space: str = "wide"
    method: str = BAYES
    floor: float = 0.9
    """Least fidelity, ``exp(-KL)``, of what is kept."""
    most: int = 60
    """Ways to lose that are measured; of ``exhaustive``: no matter."""
    num_prompts: int = 0
    """Of the file, by lot; 0: all."""
    longest: int = 2048
    """Prompts of more tokens are left out."""
    num_next: int = 16
    """Tokens of an answer that are compared."""
    window: int = 64
    """Tokens back to which attention is near, for the scores of heads."""
    repeats: int = 7
    """Runs of which the fastest counts, for the costs."""
    seed: int = 0
