"""What an answer consists of, in the order of its growing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["content", "reasoning"]


@dataclass(frozen=True, slots=True)
class Said:
    """More of the answer's text, or of what the model thought before."""

    kind: Kind
    text: str


@dataclass(frozen=True, slots=True)
class CallBegun:
    """The next call of a tool; its arguments follow."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """More of a call's arguments; joined, the JSON of an object."""

    index: int
    text: str


Event = Said | CallBegun | Arguments
