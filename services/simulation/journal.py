"""What happened in a simulated mesh, in order: one line an event, the same bytes for the same seed.

Owns the lines and their digest. Takes the place of structlog's output while a mesh runs.
"""

from __future__ import annotations

import hashlib
import re
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, cast

import structlog

from microserve.protocol import log
from microserve.protocol.errors import CapacityError, GrantsFull, PeerError
from microserve.services.router.oversight.mistake import place_of
from microserve.services.simulation.loop import VirtualLoop

DEFECTS = frozenset(
    {
        *(log.STEP_FAILED, log.BUS_HANDLER_FAILED, log.STRATEGY_FAILED, log.SERVICE_FAILED),
        *(log.TURN_FAILED, log.REQUEST_FAILED),
    }
)
"""Events that no fault outside of a process may cause."""

BY_STRATEGIES = frozenset({log.STRATEGY_FAILED, log.STRATEGY_SLOW, log.PLAN_FAILED})
"""Events that tell of an author's mistake."""

BY_THE_REAL_CLOCK = frozenset({log.STRATEGY_SLOW})
"""Events that the machine may cause: counted, but no part of what is the same for the same seed."""

QUEUED_S = 1.0
"""No work of others takes so long in the meshes that are judged by time; want of blocks or grants does."""


class Journal:
    """Lines of one mesh."""

    def __init__(self, loop: VirtualLoop, *, keep: bool) -> None:
        """``keep``: remember the lines, and not only their digest."""
        self.lines: list[str] = []
        self.defects: list[str] = []
        self.events: Counter[str] = Counter()
        self.mistakes: list[tuple[str, str]] = []
        """Of strategies and their plans: what was raised, and ``FILE:LINE`` of theirs, if that is known."""
        self.slow: list[str] = []
        """Likewise, the places where they held a router for too long."""
        self.held_up: set[str] = set()
        """Ids, as clients know them, of requests that an engine put back for want of blocks or grants, or let
        wait for them before it began."""
        self.excused: frozenset[str] = frozenset()
        """Of :data:`DEFECTS`, those that a fault of this world explains."""
        self.continued: list[tuple[str, int]] = []
        """Id, as clients know it, and number of delivered tokens of each request that began anew."""
        self._loop = loop
        self._keep = keep
        self._digest = hashlib.blake2b(digest_size=16)

    @property
    def digest(self) -> str:
        return self._digest.hexdigest()

    def note(self, event: str, **fields: object) -> None:
        """Write a line in the name of the process whose callback runs."""
        process = self._loop.current
        if process is not None and not process.is_alive:
            return
        name = process.name if process is not None else "simulation"
        told = " ".join([f"{key}={value}" for key, value in fields.items()])
        line = f"{self._loop.now:.6f} {name} {event} {told}"
        self.events[event] += 1
        if event not in BY_THE_REAL_CLOCK:
            self._digest.update(line.encode())
        if self._keep:
            self.lines.append(line)
        if event in DEFECTS and event not in self.excused:
            self.defects.append(line)

    def capture(self, name: str, event: dict[str, Any]) -> None:
        """The only processor: structlog goes no further."""
        trace = event.pop("exc_info", None)
        if name in BY_STRATEGIES:
            self._take_mistake(name, event, trace)
        if trace is True or isinstance(trace, BaseException):
            event["trace"] = (
                "".join(traceback.format_exception(trace))
                if isinstance(trace, BaseException)
                else traceback.format_exc()
            )
        waited_s = max(event.get("queued_s", 0.0), event.get("granted_s", 0.0))
        is_refused = name == log.REQUEST_CONTINUED and event["code"] == GrantsFull.code
        if event.get("num_preemptions") or waited_s > QUEUED_S or is_refused:
            self.held_up.add(str(event["request_id"]).partition("~")[0])
        if name == log.REQUEST_CONTINUED:
            self.continued.append((str(event["request_id"]).partition("~")[0], int(event["delivered"])))
        self.note(name, **event)

    def _take_mistake(self, name: str, event: dict[str, Any], error: object) -> None:
        place = str(event.get("at", ""))
        if name == log.STRATEGY_SLOW:
            self.slow.append(place)
        elif not isinstance(error, BaseException):
            self.mistakes.append((str(event.get("error", "")), place))
        elif name == log.STRATEGY_FAILED or not isinstance(error, PeerError | CapacityError):
            self.mistakes.append((f"{type(error).__name__}: {error}", place or place_of(error)))

    def open(self) -> None:
        """From now on, everything that is logged in this process comes here."""
        structlog.configure(
            processors=cast(Any, [self.capture]),
            wrapper_class=cast(Any, _Teller),
            logger_factory=_nobody,
            cache_logger_on_first_use=False,
        )

    def close(self) -> None:
        structlog.reset_defaults()


class _Teller:
    """What a service logs by: hands its events on as they are, those of a level that services write."""

    def __init__(
        self, _logger: object, processors: Sequence[Callable[[str, dict[str, Any]], None]], context: object
    ) -> None:
        (self._tell,) = processors

    def info(self, event: str, **fields: Any) -> None:
        self._tell(event, fields)

    warning = error = info

    def exception(self, event: str, **fields: Any) -> None:
        self._tell(event, {"exc_info": True, **fields})

    def debug(self, event: str, **fields: Any) -> None:
        """Not told."""


def _nobody() -> object:
    """Stands where structlog wants a logger that writes: there is none."""
    return _nobody


def plainly(line: str) -> str:
    """What a line of the journal says went wrong: the last line of its traceback, or else its error."""
    text, _, trace = line.partition(" trace=")
    told = [each for each in trace.splitlines() if each and not each.startswith(" ")]
    found = told[-1] if told else text.partition(" error=")[2] or text
    return re.sub(r"^microserve\.[\w.]*\.(\w+: )", r"\1", found)
