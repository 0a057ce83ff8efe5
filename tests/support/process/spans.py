"""Spans as services tell them, made at once and kept: an output that sends nowhere (protocol/tracing)."""

from __future__ import annotations

from typing import Any

from microserve.protocol.tracing.span import Make, Span


class Kept:
    def __init__(self) -> None:
        self.spans: list[Span] = []

    def tell(self, make: Make, given: tuple[Any, ...]) -> None:
        self.spans += [span for span in make(*given) if span.own.is_sampled]

    def close(self) -> None:
        pass
