"""What a gateway has told of its mesh, event by event, and the few numbers that stand above all.

Sans-I/O; ``now`` is this process's monotonic clock. Bounded by :data:`MAX_ENDED`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import msgspec

from microserve.gateway.view.feed import Delta, Snapshot
from microserve.gateway.view.forms import EngineForm, HealthForm, MeshForm, RequestForm, RequestsForm
from microserve.protocol.messages.check import DIFFERS, UNFINISHED

RATE_S = 60.0
"""Rates are of so long, or of as long as is known."""
MAX_ENDED = 5000
SNAPSHOT_ENDED = 200
"""A snapshot with so many may have left out older ones."""

_event = msgspec.json.Decoder(Snapshot | Delta)


class Summary(msgspec.Struct, frozen=True):
    requests_per_s: float
    tokens_per_s: float
    """Of outputs, counted when a request ends."""
    rate_s: float
    """What the two are of."""
    running: int
    waiting: int
    """Sequences, on engines that are members."""
    kv_usage: float
    """Blocks that sequences and grants use, of all engines; 0 to 1."""
    hit_rate: float
    """Prompt tokens that were cached, of those of the requests that the rates are of; 0 to 1."""
    alarms: int
    check: str = ""
    """What self-checks have found, in a word and an age; empty: none has been made."""


class Picture:
    def __init__(self) -> None:
        self.at = 0.0
        """Wall clock of the gateway; 0: nothing has been heard."""
        self.heard_at = 0.0
        self.index_alive = True
        self.engines: dict[str, EngineForm] = {}
        self.running: Sequence[RequestForm] = ()
        self.num_running = 0
        self.health: HealthForm | None = None
        self._ended: deque[tuple[float, RequestForm]] = deque()
        self._skipped: deque[tuple[float, int]] = deque()
        self._known_since = 0.0

    def take(self, event: bytes, now: float) -> None:
        """The data of one event of ``/view/feed``. Raises :class:`msgspec.MsgspecError` for what is none."""
        told = _event.decode(event)
        self.at, self.heard_at, self.index_alive = told.at, now, told.index_alive
        self.num_running = told.num_running
        if isinstance(told, Snapshot):
            self._begin(told.engines, told.running, told.ended, told.health, now)
            return
        for engine in told.engines:
            self.engines[engine.id] = engine
        for engine_id in told.gone:
            self.engines.pop(engine_id, None)
        if told.running is not None:
            self.running = told.running
        if told.health is not None:
            self.health = told.health
        if told.num_skipped:
            self._skipped.append((now, told.num_skipped))
        self._add(told.ended, now)

    def look(self, mesh: MeshForm, requests: RequestsForm, health: HealthForm, now: float) -> None:
        """All at once, as the paths of ``/view`` have it."""
        self.at, self.heard_at, self.index_alive = mesh.at, now, mesh.index_alive
        self.num_running = len(requests.running)
        is_all = len(requests.ended) >= requests.num_kept
        newest_last = sorted(requests.ended, key=lambda form: -form.age_s)
        self._begin(mesh.engines, requests.running, newest_last, health, now, is_all=is_all)

    def requests(self, engine: str = "") -> list[RequestForm]:
        """Those that run, then those that have ended, the newest first; ``engine``: it took part."""
        forms = [*self.running, *(form for _, form in reversed(self._ended))]
        return [form for form in forms if not engine or engine in form.engines]

    def age_s(self, form: RequestForm, now: float) -> float:
        """Since its end, or since its arrival if it runs."""
        if not form.at:
            return form.age_s + now - self.heard_at
        return next((now - ended for ended, each in reversed(self._ended) if each is form), form.age_s)

    def summary(self, now: float) -> Summary:
        since = max(now - RATE_S, self._known_since)
        rate_s = max(1.0, now - since)
        ended = [form for at, form in self._ended if at >= since]
        skipped = sum(number for at, number in self._skipped if at >= since)
        output = sum(form.output_tokens for form in ended)
        prompt = sum(form.prompt_tokens for form in ended)
        # Of those that were only counted, as of the others.
        scale = (len(ended) + skipped) / len(ended) if ended else 1.0
        loads = [engine.load for engine in self.engines.values() if engine.load is not None]
        used = sum(load.used_blocks for load in loads)
        rest = sum(load.cached_blocks + load.free_blocks + load.quarantined_blocks for load in loads)
        return Summary(
            requests_per_s=(len(ended) + skipped) / rate_s,
            tokens_per_s=output * scale / rate_s,
            rate_s=rate_s,
            running=sum(load.running for load in loads),
            waiting=sum(load.waiting for load in loads),
            kv_usage=used / (used + rest) if used + rest else 0.0,
            hit_rate=sum(form.cached_tokens for form in ended) / prompt if prompt else 0.0,
            alarms=len(self.health.alarms) if self.health is not None else 0,
            check=check_light(self.health, self.at),
        )

    def _begin(
        self,
        engines: Sequence[EngineForm],
        running: Sequence[RequestForm],
        ended: Sequence[RequestForm],
        health: HealthForm,
        now: float,
        *,
        is_all: bool | None = None,
    ) -> None:
        self.engines = {engine.id: engine for engine in engines}
        self.running, self.health = running, health
        self._ended.clear()
        self._skipped.clear()
        self._known_since = float("-inf")
        if not (len(ended) < SNAPSHOT_ENDED if is_all is None else is_all) and ended:
            self._known_since = now - ended[0].age_s
        self._add(ended, now)

    def _add(self, ended: Sequence[RequestForm], now: float) -> None:
        """The oldest first."""
        self._ended.extend((now - form.age_s, form) for form in ended)
        while len(self._ended) > MAX_ENDED:
            self._known_since, _ = self._ended.popleft()
        while self._skipped and now - self._skipped[0][0] > RATE_S:
            self._skipped.popleft()


def check_light(health: HealthForm | None, at: float) -> str:
    """Of all pairs together: one that differs is wrong, whatever the others say. ``at``: now, wall clock."""
    checks = [each for each in health.checks if each.outcome != UNFINISHED] if health is not None else []
    if not checks:
        return ""
    word = "DIFFERS" if any(each.outcome == DIFFERS for each in checks) else "ok"
    return f"{word} {max(0.0, at - max(each.at for each in checks)):.0f} s ago"
