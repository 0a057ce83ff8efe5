"""Aborts that an engine has not confirmed yet. Sans-I/O; the connection sends and repeats them."""

from __future__ import annotations

from collections.abc import Collection


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

    def take_due(self, sent_before: float, using: Collection[str] = ()) -> list[str]:
        """Remove and return the requests whose abort must be sent again, under a new call id.

        Not those in ``using``: a newer attempt of theirs is there by now, and would be ended instead. The
        abort that was sent comes before it, or the connection has ended.
        """
        due = [
            call_id
            for call_id, (request_id, sent_at) in self._pending.items()
            if sent_at <= sent_before and request_id not in using
        ]
        return [self._pending.pop(call_id)[0] for call_id in due]

    def clear(self) -> None:
        self._pending.clear()
