"""What an alert is."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Severity(StrEnum):
    CRITICAL = "critical"
    """Somebody is not served, or something is not true: wake a person."""
    WARNING = "warning"
    """It is served, at a cost, or not for long: look today."""


@dataclass(frozen=True)
class Alert:
    name: str
    """In the plural world of an alert manager: it begins with ``Microserve``."""
    expression: str
    """Whatever it gives is wrong."""
    lasts: str
    """So long before it fires."""
    severity: Severity
    summary: str
    """A line, with ``{{ $labels.NAME }}``, that ends with the next command."""
    means: str
    """A sentence or two, for docs/operations.md and the alert's description."""
    then: tuple[str, ...]
    """What to do, one after the other; Markdown."""

    @property
    def anchor(self) -> str:
        """Of its part in docs/operations.md."""
        return self.name.lower()
