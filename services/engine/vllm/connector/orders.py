"""What the scheduler's side tells the worker's with a step. Plain data, pickled by vLLM."""

from __future__ import annotations

from dataclasses import dataclass, field

from microserve.services.engine.vllm.connector.sends import Ended, Part


@dataclass(frozen=True, slots=True)
class Watched:
    """A receive that vLLM keeps blocks for: the worker reports it when its word is TAKE or START, or, if its
    request is aborted, DROP."""

    id: int
    request_id: str
    is_aborted: bool
    blocks: list[int]
    """Of an aborted one, those that were granted."""


@dataclass(frozen=True, slots=True)
class Started:
    """A receive that this step computes, whose KV ``[matched, end)`` may not be all in."""

    id: int
    matched: int
    end: int
    blocks: list[int]


@dataclass(frozen=True, slots=True)
class Release:
    """An ended request whose blocks nobody needs any more."""

    request_id: str
    blocks: list[int]
    """To be cleared: what was left in them is nobody's."""


@dataclass(frozen=True, slots=True)
class Copy:
    """The tail of a receive, behind its last whole block, into a block of whoever generates from it."""

    source: int
    target: int


@dataclass
class Orders:
    parts: list[Part] = field(default_factory=list)
    ended: list[Ended] = field(default_factory=list)
    watched: list[Watched] = field(default_factory=list)
    started: list[Started] = field(default_factory=list)
    releases: list[Release] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)
    """Made before anything is computed."""
    is_preempting: bool = False
    """A send's blocks may be overwritten in this step."""
