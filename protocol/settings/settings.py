"""Typed settings: every field with its default, its bounds and its sentence, and what must hold between them.

Classes are given the numbers they need, never ``Settings``. Where values come from is sources.py's.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from microserve.protocol.errors import ConfigError
from microserve.protocol.settings.bounds import (
    Count,
    CountOrZero,
    Port,
    Positive,
    PositiveOrZero,
    Section,
    fault_of_number,
)
from microserve.protocol.settings.engine import (
    BACKENDS,
    CPU_KERNELS,
    NATIVE,
    VLLM_SERVE,
    EngineSettings,
    KvCacheSettings,
    ModelSettings,
    NvshmemSettings,
)
from microserve.protocol.settings.gateway import GatewaySettings
from microserve.protocol.settings.vllm import VllmSettings

SECRET_FIELDS = ("gateway.api_keys", "vllm.api_key")
"""Never printed, not even when they are wrong."""

LOG_LEVELS = ("debug", "info", "warning", "error", "critical")
_OLD_LEVELS = {"warn": "warning", "fatal": "critical", "notset": "debug"}
_ADDRESS = re.compile(r"tcp://(\[[^]\s]+\]|[^][:/\s]+):(?P<port>\d{1,5})|ipc://\S+|inproc://\S+")

_ADDRESSES = ("address", "events_address", "replay_address", "routers", "door_address")


class BusSettings(Section, frozen=True):
    heartbeat_interval_s: Positive = 0.25
    liveness: Count = 6
    """Missed intervals after which a peer is lost."""
    stuck_s: Positive = 20.0
    """A busy engine whose progress stands still for so long is lost."""
    high_water_mark: Count = 10_000
    credit: Count = 64
    """Window of token-stream messages per connection."""
    linger_s: PositiveOrZero = 1.0
    curve_dir: str = ""
    """Directory of CURVE keys (``microserve keys``), or of one for each role (``--mesh``)."""
    insecure: bool = False
    """Run without keys: whoever reaches a service may read prompts, publish code and be an engine."""


class IndexSettings(Section, frozen=True):
    address: str = "tcp://127.0.0.1:7100"
    metrics_port: Port = 0
    """Where its metrics are read, at ``metrics.host``; 0: nowhere."""
    max_mb: Count = 256
    control_path: str = ""
    """File (SQLite) of the control log; empty: in memory, published strategies end with the index."""
    foreign: list[str] = msgspec.field(default_factory=list)
    """Other people's engines whose KV events are followed: ``ID model=NAME events=ADDRESS replay=ADDRESS
    block_size=TOKENS rank=N``, of which ``replay`` and ``rank`` may be left out."""


class RouterSettings(Section, frozen=True):
    id: str = ""
    address: str = "tcp://127.0.0.1:7101"
    metrics_port: Port = 0
    """Where its metrics are read, at ``metrics.host``; 0: nowhere."""
    default_strategy: str = "auto"
    strategies: dict[str, dict[str, Any]] = msgspec.field(default_factory=dict)
    """Parameters by strategy, e.g. ``[router.strategies.balanced] ratio = 0.2``."""
    strategy_files: list[str] = msgspec.field(default_factory=list)
    """Python files with strategies of your own."""
    max_requests: Count = 1024
    headroom: Annotated[float, Meta(ge=0, le=1)] = 0.5
    """While several API keys are in use: share of the engines' rate that one which has had its part leaves
    idle for the others' first tokens; 0: it may use all that they leave."""
    max_ttft_s: PositiveOrZero = 0.0
    """A first token predicted to take longer is refused at once: 429 with Retry-After; 0: no bound."""
    deadline_s: Positive = 600.0
    """Longest life of a request."""
    call_timeout_s: Positive = 30.0
    """Longest wait for a grant or an acceptance."""
    strategy_idle_s: Positive = 5.0
    """A strategy that for so long waits for no engine and yields nothing is given up for plain service."""
    strategy_budget_s: Positive = 0.1
    """Longest time between two ``await`` of a strategy; a version that often needs more is taken back."""
    check_interval_s: PositiveOrZero = 60.0
    """So often one pair of engines in the mesh is asked a small prompt cold, cached and with KV transferred,
    whatever the number of routers; answers that differ take the pair out of use. 0: this router checks
    none."""
    index_max_mb: Count = 256
    record_requests: CountOrZero = 10_000
    """Of so many it is remembered what their strategy saw and chose (``microserve explain``); 0: of none."""
    record_max_mb: Count = 64
    """Of these records; beyond it the oldest go."""
    trace_path: str = ""
    """File that outlives the router: where it stood when a strategy stopped it for good. Its next life keeps
    away from that version; empty: it does not."""


class LogSettings(Section, frozen=True):
    level: str = "info"
    dir: str = ""
    """Directory of one JSON-lines file a service; empty: stderr."""
    file: str = ""
    """Its name there; empty: ``SERVICE-ID.jsonl``."""
    max_mb: CountOrZero = 100
    """A file that would become larger is moved aside (``.1``, ``.2``, ...); 0: it grows."""
    keep: CountOrZero = 5
    """Files that were moved aside, the oldest of which go; 0: it begins anew."""
    max_refusals_per_s: Count = 10
    """Lines a second for each kind of refusal (event, status, code); the rest is counted in
    ``log.sampled``."""


class MetricsSettings(Section, frozen=True):
    """Of every service but the gateway, which has them at its own address."""

    host: str = "127.0.0.1"
    """Address of their ports. Whoever reaches one reads what is measured: no prompt, no answer, no key."""


class MeshSettings(Section, frozen=True):
    """What ``microserve up`` starts."""

    engines: Count = 2
    metrics: bool = True
    """Metrics of every service, at free ports where the settings name none."""
    ready_timeout_s: Positive = 180.0
    max_restarts: CountOrZero = 5
    """Restarts of one child in ``restart_window_s`` before it is left down; the others serve on."""
    restart_window_s: Positive = 60.0
    watchdog_s: PositiveOrZero = 15.0
    """A service that makes no progress for so long, an engine for four times as long, is killed and started
    again; 0: none is."""


class Settings(Section, frozen=True):
    bus: BusSettings = BusSettings()
    model: ModelSettings = ModelSettings()
    engine: EngineSettings = EngineSettings()
    kvcache: KvCacheSettings = KvCacheSettings()
    nvshmem: NvshmemSettings = NvshmemSettings()
    vllm: VllmSettings = VllmSettings()
    index: IndexSettings = IndexSettings()
    router: RouterSettings = RouterSettings()
    gateway: GatewaySettings = GatewaySettings()
    log: LogSettings = LogSettings()
    metrics: MetricsSettings = MetricsSettings()
    mesh: MeshSettings = MeshSettings()

    def check(self) -> Settings:
        """Bounds that types cannot say. Raises :class:`ConfigError` naming the path; returns itself."""
        for section in msgspec.structs.fields(self):
            for field in msgspec.structs.fields(section.type):
                value = getattr(getattr(self, section.name), field.name)
                if fault := fault_of_number(f"{section.name}.{field.name}", field.type, value):
                    raise fault
        self._check_words()
        self._check_addresses()
        self._check_heap()
        self._check_attention()
        self._check_backend()
        routers = len(dict.fromkeys(self.gateway.routers or [self.router.address]))
        if self.gateway.router_keys and len(self.gateway.router_keys) != routers:
            raise ConfigError(
                f"gateway.router_keys must name one key for each of {routers} routers, names "
                f"{len(self.gateway.router_keys)}",
                field="gateway.router_keys",
            )
        if bool(self.gateway.tls_cert) != bool(self.gateway.tls_key):
            given, missing = ("cert", "key") if self.gateway.tls_cert else ("key", "cert")
            raise ConfigError(
                f"gateway.tls_{missing} must be set as well as gateway.tls_{given}",
                field=f"gateway.tls_{missing}",
            )
        if self.bus.credit * 4 > self.bus.high_water_mark:
            raise ConfigError(
                "bus.credit must be at most a quarter of bus.high_water_mark", field="bus.credit"
            )
        return self

    @property
    def heap(self) -> str:
        """``kvcache.heap``, with ``auto`` decided; empty of an engine that has no KV of its own."""
        if self.engine.backend == VLLM_SERVE:
            return ""
        if self.kvcache.heap != "auto":
            return self.kvcache.heap
        return "shm" if self.engine.device == "cpu" else "cuda_ipc"

    @property
    def heaps(self) -> list[str]:
        """Kinds of heap and door through which an engine can be written to, best first."""
        if not self.heap:
            return []
        return [*([self.heap] if self.kvcache.share_memory else []), *self.kvcache.doors]

    def _check_words(self) -> None:
        level = self.log.level.lower()
        for field, value, words in (
            ("model.dtype", self.model.dtype, ("float32", "bfloat16", "float16")),
            ("model.weights", self.model.weights, ("dtype", "int8")),
            ("model.load_format", self.model.load_format, ("auto", "random")),
            ("engine.backend", self.engine.backend, BACKENDS),
            ("engine.cpu_kernels", self.engine.cpu_kernels, CPU_KERNELS),
            ("log.level", _OLD_LEVELS.get(level, level), LOG_LEVELS),
        ):
            if value not in words:
                known = " or ".join([", ".join(map(repr, words[:-1])), repr(words[-1])])
                raise ConfigError(f"{field} must be {known}, is {value!r}", field=field)
        is_native = self.engine.device == "cpu" and self.engine.cpu_kernels != "transformers"
        if self.model.weights != "dtype" and not is_native:
            problem = "model.weights 'int8' needs the native CPU step: engine.device 'cpu', no 'transformers'"
            raise ConfigError(problem, field="model.weights")

    def _check_addresses(self) -> None:
        for section in msgspec.structs.fields(self):
            for field in msgspec.structs.fields(section.type):
                if field.name not in _ADDRESSES:
                    continue
                value = getattr(getattr(self, section.name), field.name)
                for address in [value] if isinstance(value, str) else value:
                    found = _ADDRESS.fullmatch(address)
                    if not found or int(found["port"] or 0) > 65535:
                        path = f"{section.name}.{field.name}"
                        raise ConfigError(
                            f"{path} must be tcp://HOST:PORT, [HOST] for IPv6, or ipc://PATH, is {address!r}",
                            field=path,
                        )

        self.engine.check_advertise()
        self.engine.check_cluster()

    def _check_heap(self) -> None:
        heap, device = self.heap, self.engine.device
        if self.engine.backend == VLLM_SERVE:
            return
        if heap not in ("shm", "cuda_ipc", "nvshmem"):
            raise ConfigError(
                f"kvcache.heap must be 'auto', 'shm', 'cuda_ipc' or 'nvshmem', is {heap!r}",
                field="kvcache.heap",
            )
        if not re.fullmatch(r"cpu|cuda(:[0-9]{1,3})?", device):
            raise ConfigError(
                f"engine.device must be 'cpu' or 'cuda:N', is {device!r}", field="engine.device"
            )
        if device != "cpu" and heap == "shm":
            raise ConfigError(
                f"kvcache.heap must be 'cuda_ipc' or 'nvshmem' on engine.device {device!r}, is 'shm'",
                field="kvcache.heap",
            )
        if device == "cpu" and heap != "shm":
            raise ConfigError(
                f"engine.device must be 'cuda:N' for kvcache.heap {heap!r}, is 'cpu'", field="engine.device"
            )
        if heap == "nvshmem":
            self.nvshmem.check(curve_dir=self.bus.curve_dir)
        self.kvcache.check_doors(heap, is_guarded=bool(self.bus.curve_dir or self.bus.insecure))

    def _check_attention(self) -> None:
        attention, problem = self.engine.attention, None
        if attention not in ("auto", "triton", "flashinfer"):
            problem = f"engine.attention must be 'auto', 'triton' or 'flashinfer', is {attention!r}"
        elif attention != "auto" and self.engine.device == "cpu":
            problem = f"engine.attention must be 'auto' on engine.device 'cpu', is {attention!r}"
        elif attention == "flashinfer" and self.engine.cuda_exact:
            problem = "engine.attention 'flashinfer' gives no exact bits, which engine.cuda_exact asks for"
        elif attention == "flashinfer" and self.model.dtype == "float32":
            problem = "engine.attention 'flashinfer' does bfloat16 and float16, model.dtype is 'float32'"
        if problem is not None:
            raise ConfigError(problem, field="engine.attention")

    def _check_backend(self) -> None:
        self.vllm.check()
        self.model.check_adapters(self.engine.backend)
        backend = self.engine.backend
        if backend == NATIVE:
            return
        if self.model.weights != "dtype":
            raise ConfigError(
                f"model.weights must be 'dtype' for engine.backend {backend!r}, is {self.model.weights!r}",
                field="model.weights",
            )
        if backend == VLLM_SERVE and not self.vllm.url:
            raise ConfigError("vllm.url must be set for engine.backend 'vllm-serve'", field="vllm.url")
