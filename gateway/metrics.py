"""Metrics of one gateway process: what happened is added to plain numbers; the text is made off the loop, of
copies.

Families are in protocol/metrics/table/gateway.py. No label is ever a request, a client or a prompt; the name
of an API key is one. A text is kept for a second.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from time import thread_time
from typing import TypeVar

from prometheus_client.core import Metric

from microserve.gateway.keys.usage import Counts
from microserve.protocol.messages.router import Ended
from microserve.protocol.metrics.family import Family
from microserve.protocol.metrics.histogram import Histogram
from microserve.protocol.metrics.lag import LoopLag
from microserve.protocol.metrics.readings import Readings
from microserve.protocol.metrics.strategies import StrategyAccount
from microserve.protocol.metrics.table import common
from microserve.protocol.metrics.table import gateway as table
from microserve.protocol.metrics.text import metrics_of, names_of, of_process, text_of

CACHE_S = 1.0
FINISH_REASONS = ("stop", "length", "abort", "error")
T = TypeVar("T")
VLLM_NAMES = names_of(table.GATEWAY)


@dataclass(frozen=True, slots=True)
class Levels:
    """What is measured when somebody looks."""

    num_choices: int
    mailbox_tokens: int
    bus_dropped: int
    bus_failed: int
    routers_alive: int
    keys: Mapping[str, Counts] = field(default_factory=dict)
    """What each API key has used, by its name: as many as there are in the operator's file."""
    key_streams: Mapping[str, int] = field(default_factory=dict)
    log_dropped: Mapping[str, int] = field(default_factory=dict)
    """Lines that could not be written, by reason."""
    log_left_out: int = 0
    engines_running: int = 0
    """Of all engines together, as the router that knows of most said last."""
    engines_waiting: int = 0
    kv_usage: float = 0.0


def _made(family: Family) -> Histogram:
    return Histogram(family.bounds)


class GatewayMetrics:
    """One method for each thing that happens; called in the loop."""

    def __init__(self, model: str, clock: Callable[[], float]) -> None:
        self._model = model
        self._clock = clock
        self._ttft, self._inter_token, self._e2e = map(_made, (table.TTFT, table.INTER_TOKEN, table.E2E))
        self._times = {
            family: _made(family)
            for family in (
                *(table.QUEUE_TIME, table.PREFILL_TIME, table.DECODE_TIME, table.INFERENCE_TIME, table.TPOT),
                *(table.PROMPT_LENGTH, table.OUTPUT_LENGTH),
            )
        }
        self._max_tokens, self._n = _made(table.MAX_TOKENS), _made(table.N)
        self._prompt_tokens = self._generation_tokens = self._preemptions = 0
        self._sources = dict.fromkeys(("local_compute", "local_cache_hit", "external_kv_transfer"), 0)
        self._finished = dict.fromkeys(FINISH_REASONS, 0)
        self._responses: Counter[tuple[str, str]] = Counter()
        self._disconnects: Counter[str] = Counter()
        self._calls = {"read": 0, "unread": 0}
        self._by_strategy = StrategyAccount(table.BY_STRATEGY)
        self._cpu_s = {"copy": 0.0, "text": 0.0}
        self.lag = LoopLag()
        self._making = asyncio.Lock()
        self._text: dict[bool, tuple[float, bytes]] = {}

    def first_token(self, seconds: float) -> None:
        self._ttft.observe(seconds)

    def next_tokens(self, seconds: float, num_tokens: int) -> None:
        """``num_tokens`` came together, ``seconds`` after the ones before."""
        self._inter_token.observe(seconds / num_tokens)

    def submitted(self, prompt_tokens: int, n: int, max_tokens: int) -> None:
        """A request, ``prompt_tokens`` of all its prompts; of each ``n`` choices of ``max_tokens`` at
        most."""
        self._prompt_tokens += prompt_tokens
        self._n.observe(n)
        self._max_tokens.observe(max_tokens)

    def choice_ended(self, reason: str, output_tokens: int) -> None:
        """``reason``: ``stop``, ``length``, ``abort`` or ``error``."""
        self._finished[reason] += 1
        self._generation_tokens += output_tokens

    def ended(self, ended: Ended) -> None:
        """What the router has said at a choice's end."""
        self._by_strategy.ended(ended)
        if ended.reason not in ("stop", "length"):
            return
        usage, phases, times = ended.usage, ended.phases, self._times
        num_received = min(usage.received_tokens, usage.prompt_tokens)
        num_cached = min(usage.cached_tokens, usage.prompt_tokens - num_received)
        self._sources["local_compute"] += usage.prompt_tokens - num_cached - num_received
        self._sources["local_cache_hit"] += num_cached
        self._sources["external_kv_transfer"] += num_received
        self._preemptions += usage.num_preemptions
        prefill_s = phases.prefilled_s + phases.transferred_s + phases.first_token_s
        times[table.QUEUE_TIME].observe(phases.routed_s + phases.granted_s + phases.admitted_s)
        times[table.PREFILL_TIME].observe(prefill_s)
        times[table.DECODE_TIME].observe(phases.decoded_s)
        times[table.INFERENCE_TIME].observe(prefill_s + phases.decoded_s)
        times[table.PROMPT_LENGTH].observe(usage.prompt_tokens)
        times[table.OUTPUT_LENGTH].observe(usage.output_tokens)
        if usage.output_tokens > 1:
            times[table.TPOT].observe(phases.decoded_s / (usage.output_tokens - 1))

    def calls_read(self, read: int, unread: int) -> None:
        """``unread``: what looked like a call and was none; clients got it as text."""
        self._calls["read"] += read
        self._calls["unread"] += unread

    def answered(self, status: int, code: str, seconds: float) -> None:
        self._responses[str(status), code] += 1
        if status == 200:
            self._e2e.observe(seconds)

    def disconnected(self, phase: str) -> None:
        """``phase``: ``queued``, ``prefill`` or ``decode``."""
        self._disconnects[phase] += 1

    # --- reading -------------------------------------------------------------------------------------

    def readings(self, seen: Levels) -> Readings:
        """Of this process, as they are now."""
        began = thread_time()
        readings, model = Readings(), self._model
        for family, histogram in (
            (table.TTFT, self._ttft),
            (table.INTER_TOKEN, self._inter_token),
            (table.E2E, self._e2e),
            (table.MAX_TOKENS, self._max_tokens),
            (table.N, self._n),
            *self._times.items(),
        ):
            readings.add(family, histogram, model)
        for family, value in (
            (table.PROMPT_TOKENS, self._prompt_tokens),
            (table.GENERATED, self._generation_tokens),
            (table.PREEMPTIONS, self._preemptions),
            (table.PREFIX_QUERIES, sum(self._sources.values())),
            (table.PREFIX_HITS, self._sources["local_cache_hit"]),
            (table.CHOICES, seen.num_choices),
            (table.ENGINES_RUNNING, seen.engines_running),
            (table.ENGINES_WAITING, seen.engines_waiting),
            (table.USAGE, seen.kv_usage),
        ):
            readings.add(family, value, model)
        for source, tokens in self._sources.items():
            readings.add(table.PROMPT_SOURCES, tokens, model, source)
        for reason, count in self._finished.items():
            readings.add(table.FINISHED, count, model, reason)
        for (status, code), count in self._responses.items():
            readings.add(table.RESPONSES, count, status, code)
        readings.add_each(table.DISCONNECTS, self._disconnects)
        readings.add_each(table.CALLS, self._calls)
        readings.add(table.MAILBOX_TOKENS, seen.mailbox_tokens)
        readings.add(table.ROUTERS_ALIVE, seen.routers_alive)
        readings.add(common.BUS_DROPPED, seen.bus_dropped)
        readings.add(common.BUS_FAILED, seen.bus_failed)
        readings.add_each(common.LOG_DROPPED, seen.log_dropped)
        readings.add(common.LOG_LEFT_OUT, seen.log_left_out)
        readings.add(common.LOOP_LAG, self.lag.late)
        for name, family in table.KEY_COUNTS.items():
            readings.add_each(family, {key: getattr(each, name) for key, each in seen.keys.items() if key})
        readings.add_each(table.KEY_STREAMS, {key: num for key, num in seen.key_streams.items() if key})
        self._by_strategy.read(readings)
        self._cpu_s["copy"] += thread_time() - began
        readings.add_each(common.CPU, self._cpu_s)
        return readings

    async def families(self, seen: Levels) -> list[Metric]:
        """The same in prometheus-client's words, which take milliseconds to find: in a thread."""
        readings = self.readings(seen)
        return await self._beside(lambda: [*of_process(), *metrics_of(readings)])

    async def _beside(self, make: Callable[[], T]) -> T:
        """In a thread, whose CPU time counts."""

        def timed() -> tuple[T, float]:
            began = thread_time()
            return make(), thread_time() - began

        made, cpu_s = await asyncio.to_thread(timed)
        self._cpu_s["text"] += cpu_s
        return made

    async def text(
        self, collect: Callable[[], Awaitable[Iterable[Metric]]], *, vllm_names: bool = False
    ) -> bytes:
        """Prometheus text format; at most a second old. ``collect`` is asked when it is made anew."""
        async with self._making:
            cached = self._text.get(vllm_names)
            now = self._clock()
            if cached is not None and now - cached[0] < CACHE_S:
                return cached[1]
            metrics = await collect()
            text = await self._beside(lambda: text_of(metrics, VLLM_NAMES if vllm_names else {}))
            self._text[vllm_names] = (now, text)
            return text
