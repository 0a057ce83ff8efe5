"""Prometheus metrics of one gateway process, under our own names; vLLM's names on request.

Owns a registry of its own and the text made of it, kept for a second: rendering holds the loop for
milliseconds. No label is ever a request, a user or a prompt.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from microserve.gateway.histogram import Histogram
from microserve.gateway.keys.usage import Counts
from microserve.gateway.strategy_metrics import StrategyMetrics

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
CACHE_S = 1.0

_TTFT_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_INTER_TOKEN_BUCKETS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2),
    *(0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_E2E_BUCKETS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0),
    *(40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)

VLLM_NAMES = {
    "microserve_time_to_first_token_seconds": "vllm:time_to_first_token_seconds",
    "microserve_inter_token_latency_seconds": "vllm:inter_token_latency_seconds",
    "microserve_e2e_request_latency_seconds": "vllm:e2e_request_latency_seconds",
    "microserve_prompt_tokens": "vllm:prompt_tokens",
    "microserve_generation_tokens": "vllm:generation_tokens",
    "microserve_request_success": "vllm:request_success",
    "microserve_engine_requests_running": "vllm:num_requests_running",
    "microserve_engine_requests_waiting": "vllm:num_requests_waiting",
    "microserve_kv_cache_usage": "vllm:kv_cache_usage_perc",
}
"""Ours -> vLLM's, where both mean the same; counters without ``_total``."""


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


class GatewayMetrics:
    """One method for each thing that happens; children are kept, never looked up by label in a hot path."""

    def __init__(self, model: str, clock: Callable[[], float]) -> None:
        self._model = model
        self._clock = clock
        self._registry = registry = CollectorRegistry(auto_describe=False)
        ProcessCollector(registry=registry)
        by_model = ("model_name",)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> _Histogram:
            made = _Histogram(f"microserve_{name}", text, model, buckets)
            registry.register(made)
            return made

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"microserve_{name}", text, labels, registry=registry)

        self._ttft = histogram("time_to_first_token_seconds", "HTTP arrival to first token.", _TTFT_BUCKETS)
        self._inter_token = histogram(
            "inter_token_latency_seconds", "Between tokens; merged tokens count once.", _INTER_TOKEN_BUCKETS
        )
        self._e2e = histogram("e2e_request_latency_seconds", "HTTP arrival to last byte.", _E2E_BUCKETS)
        self._prompt_tokens = counter(
            "prompt_tokens", "Prompt tokens of admitted requests.", by_model
        ).labels(model)
        self._generation_tokens = counter("generation_tokens", "Tokens received.", by_model).labels(model)
        success = counter(
            "request_success", "Sequences by how they ended.", ("model_name", "finished_reason")
        )
        self._finished = {
            reason: success.labels(model, reason) for reason in ("stop", "length", "abort", "error")
        }
        self._responses = counter("http_responses", "HTTP answers of the API.", ("status", "code"))
        self._disconnects = counter("disconnects", "Clients that went early, by phase.", ("phase",))
        calls = counter("tool_calls", "Calls of tools in answers.", ("outcome",))
        self._calls = {outcome: calls.labels(outcome) for outcome in ("read", "unread")}
        self.by_strategy = StrategyMetrics()
        self._text: dict[bool, tuple[float, bytes]] = {}

    def first_token(self, seconds: float) -> None:
        self._ttft.observe(seconds)

    def next_tokens(self, seconds: float, num_tokens: int) -> None:
        """``num_tokens`` came together, ``seconds`` after the ones before."""
        self._inter_token.observe(seconds / num_tokens)

    def submitted(self, prompt_tokens: int) -> None:
        self._prompt_tokens.inc(prompt_tokens)

    def choice_ended(self, reason: str, output_tokens: int) -> None:
        """``reason``: ``stop``, ``length``, ``abort`` or ``error``."""
        self._finished[reason].inc()
        self._generation_tokens.inc(output_tokens)

    def calls_read(self, read: int, unread: int) -> None:
        """``unread``: what looked like a call and was none; clients got it as text."""
        self._calls["read"].inc(read)
        self._calls["unread"].inc(unread)

    def answered(self, status: int, code: str, seconds: float) -> None:
        self._responses.labels(str(status), code).inc()
        if status == 200:
            self._e2e.observe(seconds)

    def disconnected(self, phase: str) -> None:
        """``phase``: ``queued``, ``prefill`` or ``decode``."""
        self._disconnects.labels(phase).inc()

    def families(self, seen: Levels) -> list[Metric]:
        """Of this process."""
        levels = (*_level_families(self._model, seen), *_key_families(seen))
        return [*self._registry.collect(), *levels, *self.by_strategy.families()]

    async def text(
        self, collect: Callable[[], Awaitable[Iterable[Metric]]], *, vllm_names: bool = False
    ) -> bytes:
        """Prometheus text format; at most a second old. ``collect`` is asked when it is made anew."""
        now = self._clock()
        cached = self._text.get(vllm_names)
        if cached is not None and now - cached[0] < CACHE_S:
            return cached[1]
        text = generate_latest(_Exposed(await collect(), VLLM_NAMES if vllm_names else {}))
        self._text[vllm_names] = (now, text)
        return text


class _Histogram(Histogram, Collector):
    """Of one model's times."""

    def __init__(self, name: str, text: str, model: str, buckets: tuple[float, ...]) -> None:
        super().__init__(buckets)
        self._name, self._text, self._model = name, text, model

    def collect(self) -> Iterable[Metric]:
        family = HistogramMetricFamily(self._name, self._text, labels=["model_name"])
        self.add_to(family, [self._model])
        return [family]


def _level_families(model: str, levels: Levels) -> Iterator[Metric]:
    running = GaugeMetricFamily(
        "microserve_requests_running", "Sequences in flight here.", labels=["model_name"]
    )
    running.add_metric([model], levels.num_choices)
    yield running
    for name, text, value in (
        ("engine_requests_running", "Sequences in the batches of all engines.", levels.engines_running),
        ("engine_requests_waiting", "Requests that wait at engines.", levels.engines_waiting),
        ("kv_cache_usage", "Blocks of all engines in use, 0 to 1.", levels.kv_usage),
    ):
        family = GaugeMetricFamily(f"microserve_{name}", text, labels=["model_name"])
        family.add_metric([model], value)
        yield family
    yield GaugeMetricFamily("microserve_mailbox_tokens", "Tokens without a reader.", levels.mailbox_tokens)
    yield GaugeMetricFamily("microserve_routers_alive", "Routers that answer.", levels.routers_alive)
    yield CounterMetricFamily("microserve_bus_dropped", "Messages a full queue refused.", levels.bus_dropped)
    yield CounterMetricFamily("microserve_bus_failed", "Messages whose handler failed.", levels.bus_failed)
    dropped = CounterMetricFamily("microserve_log_dropped", "Lines not written, by why.", labels=["reason"])
    for reason, count in levels.log_dropped.items():
        dropped.add_metric([reason], count)
    yield dropped
    yield CounterMetricFamily(
        "microserve_log_left_out", "Lines of floods that were counted instead.", levels.log_left_out
    )


def _key_families(levels: Levels) -> Iterator[Metric]:
    """Named keys only: everybody's use is in the other families."""
    for name, text in (
        ("requests", "Requests of an API key that were let in."),
        ("refused", "Requests beyond a limit of their API key."),
        ("prompt_tokens", "Prompt tokens of an API key."),
        ("cached_tokens", "Those of them that its cache had."),
        ("output_tokens", "Output tokens of an API key."),
    ):
        family = CounterMetricFamily(f"microserve_key_{name}", text, labels=["key"])
        for key, counts in levels.keys.items():
            if key:
                family.add_metric([key], getattr(counts, name))
        yield family
    running = GaugeMetricFamily("microserve_key_streams", "Streams of an API key.", labels=["key"])
    for key, num_streams in levels.key_streams.items():
        if key:
            running.add_metric([key], num_streams)
    yield running


class _Exposed(Collector):
    """Families without the client's ``_created`` series, and with other names where ``names`` has them."""

    def __init__(self, families: Iterable[Metric], names: Mapping[str, str]) -> None:
        self._families = families
        self._names = names

    def collect(self) -> Iterator[Metric]:
        for metric in self._families:
            name = self._names.get(metric.name, metric.name)
            metric.samples = [
                Sample(name + sample.name.removeprefix(metric.name), *sample[1:])
                for sample in metric.samples
                if not sample.name.endswith("_created")
            ]
            metric.name = name
            yield metric
