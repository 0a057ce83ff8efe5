"""A quarter of an hour of every engine's load, in a fixed number of bytes: the curves of the page.

Sans-I/O. A value is the mean of what was said within its interval; an engine that said nothing repeats its
last.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator

from microserve.gateway.view.forms import LoadForm, SampleForm

KEPT_S = 900.0
INTERVAL_S = 5.0
NUM_SAMPLES = int(KEPT_S / INTERVAL_S)
MAX_ENGINES = 1024


class _Curve:
    """One number of one engine, a value each interval; the newest at the end."""

    __slots__ = ("_count", "_sum", "values")

    def __init__(self) -> None:
        self.values = array("f")
        self._sum = 0.0
        self._count = 0

    def add(self, value: float) -> None:
        self._sum += value
        self._count += 1

    def close(self) -> None:
        """The interval is over."""
        if self._count:
            self.values.append(self._sum / self._count)
        elif self.values:
            self.values.append(self.values[-1])
        if len(self.values) > NUM_SAMPLES:
            del self.values[0]
        self._sum, self._count = 0.0, 0


class _Engine:
    def __init__(self, load: LoadForm, now: float) -> None:
        self.running, self.waiting, self.kv_usage = _Curve(), _Curve(), _Curve()
        self.steps_per_s, self.prefill_share = _Curve(), _Curve()
        self.heard_at = now
        self.num_steps, self.stepped_at = load.num_steps, now

    @property
    def curves(self) -> Iterator[_Curve]:
        yield from (self.running, self.waiting, self.kv_usage, self.steps_per_s, self.prefill_share)

    def add(self, load: LoadForm, now: float) -> None:
        self.heard_at = now
        blocks = load.used_blocks + load.cached_blocks + load.free_blocks + load.quarantined_blocks
        self.running.add(load.running)
        self.waiting.add(load.waiting)
        self.kv_usage.add(load.used_blocks / blocks if blocks else 0.0)
        self.prefill_share.add(load.prefill_share)
        if now > self.stepped_at:
            # A new life of the engine begins to count anew.
            self.steps_per_s.add(max(0, load.num_steps - self.num_steps) / (now - self.stepped_at))
            self.num_steps, self.stepped_at = load.num_steps, now


class History:
    """Of all engines; ``add`` what each says, ``tick`` often enough."""

    def __init__(self, now: float) -> None:
        self._engines: dict[str, _Engine] = {}
        self._interval_ends = now + INTERVAL_S

    def add(self, engine_id: str, load: LoadForm, now: float) -> None:
        known = self._engines.get(engine_id)
        if known is None:
            if len(self._engines) >= MAX_ENGINES:
                return
            known = self._engines[engine_id] = _Engine(load, now)
        known.add(load, now)

    def tick(self, now: float) -> None:
        """Close the intervals that are over, and forget who has not been heard of for all that is kept."""
        while now >= self._interval_ends:
            if now - self._interval_ends > KEPT_S:  # this process stood still: nothing of it is kept
                self._engines.clear()
                self._interval_ends = now
            for engine in self._engines.values():
                for curve in engine.curves:
                    curve.close()
            self._interval_ends += INTERVAL_S
        gone = [each for each, engine in self._engines.items() if now - engine.heard_at > KEPT_S]
        for engine_id in gone:
            del self._engines[engine_id]

    def forms(self) -> list[SampleForm]:
        return [
            SampleForm(
                engine=engine_id,
                running=_whole(engine.running.values),
                waiting=_whole(engine.waiting.values),
                kv_usage=_short(engine.kv_usage.values),
                steps_per_s=_short(engine.steps_per_s.values),
                prefill_share=_short(engine.prefill_share.values),
            )
            for engine_id, engine in sorted(self._engines.items())
        ]


def _whole(values: Iterable[float]) -> list[int]:
    return [round(value) for value in values]


def _short(values: Iterable[float]) -> list[float]:
    return [round(value, 4) for value in values]
