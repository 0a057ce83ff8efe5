"""What a flood of one kind of line leaves out: so many a second are written, the rest is counted.

Owns the counts; sans-I/O. Somebody who is refused a thousand times a second must not fill a disk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from microserve.protocol import log

WINDOW_S = 1.0
MAX_KEYS = 256
"""Kinds told apart at a time; what is beyond counts as one of its event."""

SAMPLED = frozenset(
    {
        log.BUS_HANDLER_FAILED,
        log.ENGINE_REFUSED,
        log.FRAME_REJECTED,
        log.HTTP_FIELD_IGNORED,
        log.HTTP_PAUSED,
        log.HTTP_REJECTED,
        log.INDEX_RESYNC_FAILED,
        log.PROCESS_PRINTED,
        log.REQUEST_FAILED,
        log.SHADOW_FAILED,
        log.STRATEGY_FAILED,
        log.STRATEGY_REFUSED,
        log.STRATEGY_SLOW,
        log.TASK_FAILED,
        log.THREAD_FAILED,
        log.TURN_FAILED,
        log.WORLD_REFUSED,
    }
)
"""Events that others can bring about as often as they like. A request's last line is one if it was
refused."""


class Key(NamedTuple):
    """Kinds of lines, of which each has its own share."""

    event: str
    status: int
    reason: str


def key_of(event: Mapping[str, Any]) -> Key | None:
    """None: a line that is always written."""
    name, code = event.get("event"), event.get("code", "")
    if not isinstance(name, str) or (name not in SAMPLED and not (name == log.REQUEST_FINISHED and code)):
        return None
    status, stream = event.get("status", 0), event.get("stream")
    reason = code or (stream if isinstance(stream, str) else "")
    return Key(name, status if isinstance(status, int) else 0, str(reason)[:64])


@dataclass(slots=True)
class _Window:
    began: float
    admitted: int = 0
    left_out: int = 0


class Sampler:
    """Ask :meth:`admit` for each line, and :meth:`take_due` now and then."""

    def __init__(self, max_per_s: int) -> None:
        self.max_per_s = max_per_s
        self.left_out = 0
        """In all."""
        self._windows: dict[Key, _Window] = {}
        self._told: list[tuple[Key, int]] = []

    def admit(self, key: Key, now: float) -> bool:
        """False: count it, write nothing."""
        if key not in self._windows and len(self._windows) >= MAX_KEYS:
            self._end(now)
            if len(self._windows) >= MAX_KEYS:
                key = Key(key.event, 0, "")
        window = self._windows.setdefault(key, _Window(now))
        if now - window.began >= WINDOW_S:
            self._tell(key, window)
            window.began, window.admitted = now, 0
        if window.admitted < self.max_per_s:
            window.admitted += 1
            return True
        window.left_out += 1
        self.left_out += 1
        return False

    @property
    def is_due(self) -> bool:
        """There is, or soon will be, something to tell."""
        return bool(self._told) or any(window.left_out for window in self._windows.values())

    def take_due(self, now: float, *, all_of_it: bool = False) -> list[tuple[Key, int]]:
        """What was left out of seconds that are over; ``all_of_it``: of the running ones too."""
        self._end(now, all_of_it=all_of_it)
        told, self._told = self._told, []
        return told

    def _end(self, now: float, *, all_of_it: bool = False) -> None:
        for key, window in list(self._windows.items()):
            if all_of_it or now - window.began >= WINDOW_S:
                self._tell(key, window)
                del self._windows[key]

    def _tell(self, key: Key, window: _Window) -> None:
        if window.left_out:
            self._told.append((key, window.left_out))
            window.left_out = 0
