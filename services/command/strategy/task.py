"""What a check is asked and what it answers, between two processes. Light: whoever asks imports no router."""

from __future__ import annotations

import msgspec

from microserve.protocol.messages.strategy.control import Scalar
from microserve.services.simulation.trial.mistake import Found


class Task(msgspec.Struct):
    strategy: str
    source: str
    parameters: dict[str, Scalar]
    labels: list[list[str]]
    """Of each engine of the mesh; empty: there is none, and engines have the labels that the source names."""
    dry_run: bool = True
    is_strict: bool = False
    """A label that no engine has is a mistake, and not only worth a note."""


class Finding(msgspec.Struct):
    mistakes: list[Found]
    """Empty: it may be published."""
    notes: list[str] = []
