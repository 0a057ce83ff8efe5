"""The canonical lines of the last quarter of an hour: what ``/view/requests`` is made of.

Sans-I/O; ``now`` is of one monotonic clock. Bounded by age, by number and by bytes: a request costs one
string (its form in msgpack) and what it may be chosen and ordered by, none of which the collector looks into.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator

import msgspec

from microserve.gateway.view.forms import PhaseForm, RequestForm
from microserve.protocol.messages.strategy.decisions import Attempt
from microserve.protocol.request_id import is_named

KEPT_S = 900.0
MAX_NBYTES = 32 << 20
OVERHEAD_NBYTES = 320
"""Of a line in memory, beside its bytes."""

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(RequestForm)

GATEWAY_PHASES = frozenset({"queued", "tokenised"})


class Kept(msgspec.Struct, frozen=True, gc=False):
    """One that has ended: its form, and beside it what it is chosen by without reading that."""

    ended: float
    line: bytes
    wall_s: float
    ttft_s: float
    key: str
    strategy: str
    engines: tuple[str, ...]
    code: str

    def form(self, now: float) -> RequestForm:
        return msgspec.structs.replace(_decoder.decode(self.line), age_s=max(0.0, now - self.ended))


class Requests:
    """Of one gateway process."""

    def __init__(self, max_requests: int) -> None:
        """``max_requests`` 0: nothing is kept."""
        self._max = max_requests
        self._lines: deque[Kept] = deque()
        self.nbytes = 0
        self.num_added = 0
        """Since the start: who has seen so many has seen all up to here."""

    def __len__(self) -> int:
        return len(self._lines)

    @property
    def is_on(self) -> bool:
        return self._max > 0

    def add(self, form: RequestForm, now: float) -> None:
        """One has ended."""
        if not self._max:
            return
        line = _encoder.encode(form)
        names = form.key, form.strategy, form.code, *form.engines
        key, strategy, code, *engines = map(sys.intern, names)
        self._lines.append(
            Kept(now, line, form.wall_s, form.ttft_s or 0.0, key, strategy, tuple(engines), code)
        )
        self.num_added += 1
        self.nbytes += len(line) + OVERHEAD_NBYTES
        self.expire(now)

    def expire(self, now: float) -> None:
        while self._lines and (
            now - self._lines[0].ended > KEPT_S or len(self._lines) > self._max or self.nbytes > MAX_NBYTES
        ):
            self.nbytes -= len(self._lines.popleft().line) + OVERHEAD_NBYTES

    def newest_first(self, now: float) -> Iterator[RequestForm]:
        return (kept.form(now) for kept in reversed(self._lines))

    def kept_now(self) -> list[Kept]:
        """The newest first: for who reads them while others are added."""
        return list(reversed(self._lines))

    def since(self, num_seen: int, now: float) -> list[RequestForm]:
        """Those that were added after so many, as far as they are kept; the oldest first."""
        num_new = min(self.num_added - num_seen, len(self._lines))
        if num_new <= 0:
            return []
        newest = self.newest_first(now)
        return [next(newest) for _ in range(num_new)][::-1]

    def find(self, wanted: str, now: float) -> RequestForm | None:
        """By its id, the client's, or the id in its answer's body: the newest that is called so."""
        return next((form for form in self.newest_first(now) if is_called(form, wanted)), None)


def is_called(form: RequestForm, wanted: str) -> bool:
    return form.http_id == wanted or is_named(form.id, wanted)


def timeline(form: RequestForm, last_attempt: Attempt | None = None) -> list[PhaseForm]:
    """Its phases one after the other; they add up to ``wall_s`` as the canonical line's do. ``last_attempt``:
    as a router remembers it: a line has engines in the order of their use, and not who generated."""
    begin_s = 0.0
    parts: list[PhaseForm] = []
    last = form.engines[-1] if form.engines else ""
    first = form.engines[0] if form.engines else ""
    if last_attempt is not None and last_attempt.engine_id:
        last = first = last_attempt.engine_id
        if last_attempt.sends:
            first = last_attempt.sends[0].source
    places = {
        "granted": last,
        "prefilled": first,
        "transferred": first,
        "admitted": last,
        "first_token": last,
    }
    for name, seconds in form.phases_s.items():
        where = "gateway" if name in GATEWAY_PHASES else places.get(name, "")
        if name == "decoded":
            where = last
        parts.append(PhaseForm(name, begin_s, seconds, where or "router"))
        begin_s += seconds
    return parts
