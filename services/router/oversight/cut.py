"""Where a strategy may be broken off: in its own code, and never with something of the router's half done.

    theirs    strategies: anywhere, at once; also where the router has called them (a ``cost=``, a scorer, a
              sort key), for they may raise there anyway
    ours      not within; as soon as it returns to a strategy, or calls one (a trace function sees to that).
              A module may name functions that change nothing, ``READS_ONLY``: those are given up after a look
    neither   Python's own, other libraries: as what has called them, but a look later (they may hold a lock)

A strategy that catches even :class:`BrokenOff` gets the next one when it drops it: at its next instruction.
Knows no clock and no strategy.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from enum import Enum
from types import FrameType
from typing import Any

_PACKAGE = "microserve."
_STRATEGIES = ("microserve.services.router.strategies.", "microserve_published.", "microserve_strategies.")
_ROOM = __name__.rpartition(".")[0] + "."


class BrokenOff(BaseException):
    """No ``Exception``: a strategy that catches everything shall not catch this."""

    def __init__(self, reason: str, on_dropped: Callable[[], None]) -> None:
        """``on_dropped``: it is no more; so somebody has caught it, unless the run is over."""
        super().__init__(reason)
        self._on_dropped = on_dropped

    def __del__(self) -> None:
        self._on_dropped()


class Kind(Enum):
    OVERSEER = 1
    THEIRS = 2
    OURS = 3
    READER = 4
    NEITHER = 5


def kind(frame: FrameType) -> Kind:
    name = str(frame.f_globals.get("__name__", ""))
    if name.startswith(_STRATEGIES):
        return Kind.THEIRS
    if name.startswith(_ROOM):
        return Kind.OVERSEER
    if not name.startswith(_PACKAGE):
        return Kind.NEITHER
    reads = frame.f_globals.get("READS_ONLY", ())
    return Kind.READER if frame.f_code.co_qualname.startswith(tuple(reads)) else Kind.OURS


def is_theirs(frame: FrameType | None) -> bool:
    """A strategy's code is among what runs."""
    while frame is not None:  # this is asked at every look: nothing more than it needs
        if str(frame.f_globals.get("__name__", "")).startswith(_STRATEGIES):
            return True
        frame = frame.f_back
    return False


def place(frame: FrameType | None) -> str:
    """``FILE:LINE`` where a strategy's code stands, the innermost of what runs; empty without any."""
    theirs = (each for each in _stack(frame) if kind(each) is Kind.THEIRS)
    return next((f"{each.f_code.co_filename}:{each.f_lineno}" for each in theirs), "")


def may_be_cut(frame: FrameType | None, *, is_late: bool) -> bool:
    """Here and now; ``frame`` is what runs. ``is_late``: this is not the first look that finds it hanging."""
    first = None
    for each in _stack(frame):
        match kind(each):
            case Kind.THEIRS:
                return first is None or is_late
            case Kind.OVERSEER:
                # What it has called itself is theirs, whatever its module is named.
                return first is not None and is_late
            case Kind.OURS:
                return False
            case found:
                first = first or found
    return False


class Trap:
    """Raises in the strategy's next instruction: where the router's code returns to it, or calls it."""

    def __init__(self, make: Callable[[], BaseException]) -> None:
        self._make = make
        self._is_set = False
        self._before: Any = None
        self._entry: dict[str, Any] | None = None
        """The names of the module that the overseer has called."""

    def set(self, frame: FrameType | None) -> None:
        """``frame`` is what runs."""
        stack, self._entry = list(_stack(frame)), None
        for caller, each in zip([*stack[1:], None], stack, strict=True):
            if caller is not None and kind(caller) is Kind.OVERSEER and kind(each) is not Kind.OVERSEER:
                self._entry = each.f_globals
                break
        for each in stack:
            if self._catches(each):
                each.f_trace, each.f_trace_opcodes, each.f_trace_lines = self._trace, True, False
        if not self._is_set:
            self._is_set, self._before = True, sys.gettrace()
        sys.settrace(self._trace)

    def clear(self) -> None:
        """The run is over."""
        if self._is_set:
            self._is_set, self._entry = False, None
            sys.settrace(self._before)
            self._before = None

    def _catches(self, frame: FrameType) -> bool:
        return kind(frame) is Kind.THEIRS or frame.f_globals is self._entry

    def _trace(self, frame: FrameType, event: str, _argument: Any) -> Any:
        if not self._is_set or not self._catches(frame):
            return None
        if event in ("call", "opcode"):
            raise self._make()  # with it, Python takes the trace function away
        return self._trace


def _stack(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back
