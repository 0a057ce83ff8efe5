"""One connection from the writer's end: what is to go out, what has come back, and whether it still lives;
sans-I/O.

Frames about lanes and questions go before puts and signals that wait: a lane of one grant need not wait for
the KV of another. What gives a lane back stays behind the puts. KV is sent from where it lies.

For whoever holds the lock of post.py. Knows neither sockets nor threads.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable
from enum import Enum
from typing import Final, Protocol

from microserve.kvcache.heap.doors.tcp import frames
from microserve.protocol.errors import ProtocolViolation
from microserve.protocol.messages.kv.grant import MAX_LANES
from microserve.protocol.smoothing import smoothed

MAX_SAMPLES: Final = 8
"""That are kept, the newest."""
_MIN_MEASURED_NBYTES: Final = 1 << 17
_MAX_UNSENT_NBYTES: Final = 1 << 22
MAX_PARTS: Final = 1000
"""Of one call of ``sendmsg``: the kernel takes 1,024."""


class End(Enum):
    """Why nothing goes through a line any more."""

    LEFT = "its owner has left"
    CLOSED = "its owner has closed the connection"
    RESET = "the connection is broken"
    TORN = "its owner heard nothing for too long"
    FAULT = "its owner understood nothing"
    SILENT = "nothing was heard for too long"
    OURS = "it was closed here"


_TORN: Final = {frames.LEFT: End.LEFT, frames.SILENT: End.TORN, frames.FAULT: End.FAULT}


class Question:
    """That somebody waits for the answer to."""

    def __init__(self, answers: int, small: int) -> None:
        self.key = answers, small
        self.answer: tuple[int, int, int] | None = None


class Flight(Protocol):
    """A put that goes by another way."""

    nbytes: int
    seconds: float
    """That it took, once it is over."""

    def is_over(self) -> bool:
        """All of it is there. :class:`TransferFailed` if it will never be."""

    def drop(self) -> None:
        """Nobody asks any more."""


class Line:
    def __init__(self, silence_s: float, now: float) -> None:
        self.silence_s = silence_s
        self.end: End | None = None
        self.told: dict[int, int] = {}
        """STATE, by slot in which we hold a lane."""
        self.lanes: dict[int, bool] = {}
        """By index, those that are ours: True; let go, and not yet said to be free: False."""
        self._asked: list[Question] = []
        """And not yet answered, in order."""
        self.given_up: set[int] = set()
        """Lanes of whose ``HOLD`` we did not await the answer; not to be asked for until it is here."""
        self._puts: deque[memoryview] = deque()
        self._urgent: deque[memoryview] = deque()
        self._begun: deque[memoryview] = deque()
        """Whole frames that go out now, less the bytes that have."""
        self._frame_parts: deque[int] = deque()
        """How many parts each frame of ``_puts`` has; 0: the next of ``_flights`` must be over."""
        self._flights: deque[Flight] = deque()
        self._incoming = bytearray()
        self._heard_at = self._beat_at = now
        self.nbytes_per_s = 0.0
        """Of the network, while it was all that anybody waited for; 0: never yet."""
        self.samples: deque[tuple[int, float]] = deque(maxlen=MAX_SAMPLES)
        """Bytes and seconds that this is made of, until somebody takes them; by any thread."""
        self._full_at: float | None = None
        """Since when the socket takes no more than the network does."""
        self._full_nbytes = 0

    # --- what goes out -----------------------------------------------------------------------------

    def put(self, frame: Iterable[bytes | memoryview]) -> None:
        """In order with all that was put before."""
        parts = [memoryview(part) for part in frame]
        self._puts.extend(parts)
        self._frame_parts.append(len(parts))

    def fly(self, flight: Flight) -> None:
        """What is put after it goes out when it is over; what it reads, it reads until then."""
        self._flights.append(flight)
        self._frame_parts.append(0)

    def ask(self, kind: int, small: int, answers: int) -> Question:
        """``answers``: its kind, or one of ``HELD`` and ``BUSY`` for a ``HOLD``."""
        question = Question(answers, small)
        self._asked.append(question)
        frame = memoryview(frames.head(kind, small))
        if kind == frames.HOLD:
            self._urgent.append(frame)
        else:
            self.put([frame])
        return question

    def give_up(self, question: Question) -> None:
        """Nobody awaits the answer any more; a lane that is granted all the same is let go."""
        if question not in self._asked:
            return
        self._asked.remove(question)
        kind, small = question.key
        if kind == frames.HELD:
            self.given_up.add(small)

    def let_go(self, index: int) -> None:
        self.lanes[index] = False
        self.put([frames.head(frames.LET_GO, index)])

    @property
    def has_parts(self) -> bool:
        return bool(self._begun or self._urgent or (self._frame_parts and self._frame_parts[0]))

    @property
    def awaits_flight(self) -> bool:
        """Look again soon."""
        return bool(self._flights) and not self.has_parts

    def parts(self) -> list[memoryview]:
        """What goes out next, in this order. :class:`TransferFailed` of a flight."""
        if not self._begun:
            if self._urgent:
                self._begun, self._urgent = self._urgent, deque()
            nbytes = 0
            while self._frame_parts and nbytes < frames.MAX_PUT_NBYTES:
                if self._begun and len(self._begun) + self._frame_parts[0] > MAX_PARTS:
                    break
                if not self._frame_parts[0]:
                    if not self._flights[0].is_over():
                        break
                    flight = self._flights.popleft()
                    self.measured(flight.nbytes, flight.seconds)
                for _ in range(self._frame_parts.popleft()):
                    part = self._puts.popleft()
                    nbytes += len(part)
                    self._begun.append(part)
        return list(itertools.islice(self._begun, MAX_PARTS))

    def full(self, now: float) -> None:
        """The socket takes nothing now."""
        if self._full_at is None:
            self._full_at, self._full_nbytes = now, 0

    @property
    def unsent_nbytes(self) -> int:
        """That may wait in the kernel: of a quarter of a second, for what is urgent comes behind them."""
        most, least = _MAX_UNSENT_NBYTES, _MAX_UNSENT_NBYTES >> 4
        return max(least, min(most, int(self.nbytes_per_s / 4))) if self.nbytes_per_s else most

    def sent(self, nbytes: int, now: float) -> bool:
        """Of the last ``parts``; True where the network has been measured anew."""
        self._full_nbytes += nbytes
        while nbytes and self._begun:
            part = self._begun[0]
            if nbytes < len(part):
                self._begun[0] = part[nbytes:]
                return False
            nbytes -= len(part)
            self._begun.popleft()
        if self._full_at is not None and not self._begun and not self._frame_parts:
            self.measured(self._full_nbytes, now - self._full_at)
            self._full_at = None
            return True
        return False

    def measured(self, nbytes: int, seconds: float) -> None:
        """So many bytes took so long, with nothing else in the way."""
        if nbytes >= _MIN_MEASURED_NBYTES and seconds > 0.0:
            self.nbytes_per_s = smoothed(self.nbytes_per_s, nbytes / seconds)
            self.samples.append((nbytes, seconds))

    def copy_waiting(self) -> None:
        """What waits to go out is read from where it lies no more. Not of a flight."""
        for waiting in (self._begun, self._puts):
            for place, part in enumerate(waiting):
                waiting[place] = memoryview(bytes(part))

    # --- what comes --------------------------------------------------------------------------------

    def received(self, some: bytes, now: float) -> None:
        """:class:`ProtocolViolation`: whoever is there does not keep to the protocol."""
        self._heard_at = now
        self._incoming += some
        size = frames.HEAD.size
        whole = len(self._incoming) // size * size
        for frame in frames.HEAD.iter_unpack(bytes(self._incoming[:whole])):
            self._take(*frame)
        del self._incoming[:whole]

    def _take(self, kind: int, small: int, large: int) -> None:
        if kind == frames.TORN:
            self.lose(_TORN.get(small, End.CLOSED))
        elif kind == frames.STATE:
            self.told[small] = large
        elif kind == frames.FREE:
            if self.lanes.get(small) is False:
                del self.lanes[small]
                if not any(index // MAX_LANES == small // MAX_LANES for index in self.lanes):
                    self.told.pop(small // MAX_LANES, None)
        elif kind == frames.HELD and small in self.given_up:
            self.given_up.discard(small)
            self.let_go(small)
        elif kind == frames.BUSY and small in self.given_up:
            self.given_up.discard(small)
        elif question := self._question(frames.HELD if kind == frames.BUSY else kind, small):
            if kind == frames.HELD:
                self.lanes[small] = True
                self.told[small // MAX_LANES] = large
            question.answer = kind, small, large
            self._asked.remove(question)
        elif kind not in (frames.BEAT, frames.VALUE, frames.SYNCED):
            raise ProtocolViolation(f"frame {kind} of {small}, which nobody asked for")

    def _question(self, *key: int) -> Question | None:
        return next((question for question in self._asked if question.key == key), None)

    # --- life --------------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """A quarter of ``silence_s`` has passed, or less. After everything that came has been read."""
        if self.end is not None:
            return
        if now - self._heard_at > self.silence_s:
            self.lose(End.SILENT)
        elif now - self._beat_at >= self.silence_s / 4:
            self._beat_at = now
            self._urgent.append(memoryview(frames.head(frames.BEAT)))

    def lose(self, end: End) -> None:
        """Nothing more goes out, and no lane is ours; the socket is closed by whoever has it."""
        self.end = self.end or end
        for waiting in (self._begun, self._urgent, self._puts):
            waiting.clear()
        for flight in self._flights:
            flight.drop()
        self._flights.clear()
        self._frame_parts.clear()
        self.lanes, self.told, self._asked = {}, {}, []
