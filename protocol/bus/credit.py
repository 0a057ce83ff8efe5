"""Credit-based flow control for streams over sockets that drop at their high-water mark (WIRE.md 3).

The consumer opens a window of messages and reopens it as it consumes; the producer sends only inside the
window and merges what it may not send yet. So a slow consumer costs merging, never a lost token.
Sans-I/O (ZeroMQ Guide, chapter 7: credit-based flow control).
"""

from __future__ import annotations

MAX_CREDIT = 1 << 20
"""A larger window is clamped: it could only come from a broken peer."""


class CreditWindow:
    """Producer side: how many messages may still be sent."""

    def __init__(self, credit: int) -> None:
        self._credit = max(0, min(credit, MAX_CREDIT))

    @property
    def credit(self) -> int:
        return self._credit

    def take(self) -> bool:
        """Use one credit; False when there is none."""
        if self._credit == 0:
            return False
        self._credit -= 1
        return True

    def grant(self, messages: int) -> None:
        """The consumer has taken ``messages`` more. Negative numbers are ignored."""
        self._credit = min(self._credit + max(0, messages), MAX_CREDIT)


class CreditMeter:
    """Consumer side: when to give credit back, half a window at a time."""

    def __init__(self, window: int) -> None:
        self.window = window
        self._consumed = 0

    def consumed(self) -> int:
        """One message was taken; the number of credits to send now (0: not yet)."""
        self._consumed += 1
        if 2 * self._consumed < self.window:
            return 0
        give, self._consumed = self._consumed, 0
        return give
