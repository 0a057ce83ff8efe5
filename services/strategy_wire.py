"""What ``microserve strategy publish`` asks of the process that checks a source, and its answer. JSON."""

from __future__ import annotations

import msgspec

from microserve.protocol.messages.control import Scalar


class Task(msgspec.Struct):
    strategy: str
    source: str
    parameters: dict[str, Scalar]
    labels: list[list[str]]
    """Of each engine of the mesh."""
    dry_run: bool = True


class Finding(msgspec.Struct):
    problems: list[str]
    """Empty: it may be published."""
    notes: list[str] = []
