"""Aborts that an engine has not confirmed yet. Sans-I/O; the connection sends and repeats them."""

from __future__ import annotations


class Aborts:
    """By call id: which request, and when it was last sent."""

    def __init__(self) -> None:
        self._pending: dict[int, tuple[str, float]] = {}

    def __len__(self) -> int:
        return len(self._pending)

    def sent(self, call_id: int, request_id: str, now: float) -> None:
        self._pending[call_id] = (request_id, now)

    def confirm(self, call_id: int) -> bool:
        """The engine answered. False if the call was no pending abort."""
        return self._pending.pop(call_id, None) is not None

    def take_due(self, sent_before: float) -> list[str]:
        """Remove and return the requests whose abort must be sent again, under a new call id."""
        due = [call_id for call_id, (_, sent_at) in self._pending.items() if sent_at <= sent_before]
        return [self._pending.pop(call_id)[0] for call_id in due]

    def clear(self) -> None:
        self._pending.clear()
