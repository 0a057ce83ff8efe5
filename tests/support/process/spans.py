"""Spans as services tell them, kept: an output that sends nowhere (``protocol/tracing/output.py``)."""

from __future__ import annotations

from microserve.protocol.tracing.span import Span


class Kept:
    def __init__(self) -> None:
        self.spans: list[Span] = []

    def tell(self, span: Span) -> None:
        self.spans.append(span)

    def close(self) -> None:
        pass
