"""What the scheduler's side tells the worker's with a step. Plain data, pickled by vLLM."""

from __future__ import annotations

from dataclasses import dataclass, field

from microserve.services.engine.vllm.connector.receives import Watched
from microserve.services.engine.vllm.connector.sends import Ended, Part


@dataclass
class Orders:
    parts: list[Part] = field(default_factory=list)
    ended: list[Ended] = field(default_factory=list)
    watched: list[Watched] = field(default_factory=list)
    releases: list[str] = field(default_factory=list)
    is_preempting: bool = False
    """A send's blocks may be overwritten in this step."""
