"""Settings of an engine: its model, its steps, its KV cache and the world that it may belong to.

What must hold between them is settings.py's.
"""

from __future__ import annotations

import re
from typing import Annotated

import msgspec
from msgspec import Meta

from microserve.protocol.errors import ConfigError
from microserve.protocol.messages.adapter import fault_of_adapters
from microserve.protocol.messages.strategy.control import MAX_LABEL_CHARS, fault_of_labels
from microserve.protocol.messages.world import MAX_WORLD_RANKS, fault_of_world
from microserve.protocol.settings.bounds import Count, CountOrZero, Port, Positive, PositiveOrZero, Section

DOOR_KINDS = ("tcp", "nixl")
_LOOPBACK = re.compile(r"tcp://(127(\.\d{1,3}){3}|localhost|\[::1\]):")
_HOST = re.compile(r"\[[0-9a-fA-F:.]+\]|[0-9a-fA-F]*:[0-9a-fA-F:.]+|[^][:/\s]+")
_EVERYWHERE = ("*", "0.0.0.0", "::")
CPU_KERNELS = ("auto", "transformers", "portable", "avx2", "avx512", "avx512bf16", "amx")
NATIVE, VLLM, VLLM_SERVE = BACKENDS = ("native", "vllm", "vllm-serve")


class ModelSettings(Section, frozen=True):
    path: str = ""
    """Directory with config.json, tokenizer.json and safetensors; or ORG/NAME[@REVISION] at the Hub."""
    name: str = ""
    """Name that clients use; default: the directory's name, or ORG/NAME."""
    dtype: str = "bfloat16"
    weights: str = "dtype"
    """``dtype``, or ``int8``: matrices rounded to 8 bits with a scale for each output, by the native CPU step
    alone, which then is a must. Answers are the rounded model's, of its own revision and numerics class."""
    load_format: str = "auto"
    tool_parser: str = "auto"
    """How the model writes a call of a tool: ``qwen``, ``llama``, ``mistral``, ``deepseek``, ``gpt_oss``,
    ``deepseek_dsml``, ``glm``, ``kimi``, ``kimi_xtml``, ``gemma``; ``auto``: as its chat template shows;
    ``none``: requests with tools are refused."""
    reasoning_parser: str = "auto"
    """How it marks what it thinks before it answers: ``think``, ``mistral``, ``gpt_oss``, ``gemma``,
    ``kimi_xtml``; ``auto`` and ``none`` (it is text like any other) as above."""
    adapters: dict[str, str] = msgspec.field(default_factory=dict)
    """LoRA adapters that clients may name as their model, each with its directory (``adapter_config.json``
    and ``adapter_model.safetensors``, as PEFT writes them): ``{sql = "/models/sql-lora"}``. Needs
    ``engine.backend = "vllm"``."""
    packed_cache_mb: CountOrZero = 8192
    """Room that packed weights may take in the cache directory, all models together: engines of one machine
    map them, and start from them. 0: each engine packs its own."""

    def check_adapters(self, backend: str) -> None:
        """Raises :class:`ConfigError` naming the path."""
        fault = fault_of_adapters(self.adapters)
        if self.name and self.name in self.adapters:
            fault = f"an adapter cannot have the model's name {self.name!r}"
        elif self.adapters and backend != VLLM:
            fault = f"must be empty for engine.backend {backend!r}: 'vllm' alone serves adapters"
        elif nowhere := [name for name, directory in self.adapters.items() if not directory]:
            fault = f"{nowhere[0]!r} has no directory"
        if fault:
            raise ConfigError(f"model.adapters: {fault}", field="model.adapters")


class EngineSettings(Section, frozen=True):
    id: str = ""
    """Default: made up at start."""
    address: str = "tcp://127.0.0.1:0"
    events_address: str = "tcp://127.0.0.1:0"
    replay_address: str = "tcp://127.0.0.1:0"
    """These two with a port: of the first engine of ``mesh.engines``, one higher for each further one."""
    events_topic: str = "kv@{id}@{model}"
    """Of KV events, as other people's readers want it; ``{id}`` and ``{model}`` are put in. May be empty."""
    events_strict: bool = False
    """KV events in vLLM's keys alone, for readers that refuse others (vllm-router). Our own then know blocks
    by names of 64 bits, which costs them memory, and a restart by its numbers alone."""
    events_open: bool = False
    """KV events and their replay without CURVE, also off loopback: other people's readers have no keys. Who
    reaches the two sockets reads the tokens of every prompt."""
    metrics_port: Port = 0
    """Where its metrics are read, at ``metrics.host``; 0: nowhere. Of the first engine of ``mesh.engines``,
    one higher for each further one."""
    advertise: str = ""
    """Host, by name or number, by which others reach these sockets. Empty: as they are bound; where that is
    every interface (``tcp://0.0.0.0:PORT``), the address by which this host reaches the index."""
    labels: list[str] = msgspec.field(default_factory=list)
    cluster: str = ""
    """Where it stands, by name: engines of one cluster reach each other by a faster network than those of
    two. Strategies go by it (``prfaas``). Those without one are of one together."""
    backend: str = "native"
    """What computes: ``native`` (ours), ``vllm`` (vLLM in an environment of its own, behind the three
    actions), or ``vllm-serve`` (a stock ``vllm serve`` that somebody else runs: whole requests only)."""
    threads: Count = 1
    device: str = "cpu"
    """``cpu`` or ``cuda:N``."""
    cpu_kernels: str = "auto"
    """On a CPU: ``transformers``, or the native step by the instructions of ``amx``, ``avx512``, ``avx2`` or
    ``portable``, which give the same bits, or of ``avx512bf16``, which gives bits of its own (numerics class
    ``cpu2-...``): where engines with AMX and without it are to be of one class, those without take
    ``avx512``. ``auto``: the native step by the best there are (``avx512bf16`` before ``avx512``), or, with a
    warning, transformers where it cannot be built or does not know the model. ``amx`` was tested in
    emulation only."""
    attention: str = "auto"
    """On a GPU: ``triton``, ``flashinfer``, or ``auto`` for FlashInfer where it is installed and fits."""
    cuda_exact: bool = False
    """On a GPU: compute by kernels whose bits for a row depend on that row and its context alone, in one
    numerics class with GPUs of the same architecture; needs Triton, and costs speed. On a CPU the native step
    always does."""
    cuda_graphs: bool = True
    """On a GPU: capture decode steps at the start, and replay them."""
    max_num_seqs: Count = 64
    """Sequences in one step."""
    max_num_batched_tokens: Count = 512
    """Tokens in one step, prefill chunks and decode together."""
    max_waiting: Count = 512
    """Requests accepted and not yet running; beyond it: 429 with Retry-After."""
    max_model_len: CountOrZero = 0
    """0: the model's own."""
    grammar_timeout_s: Positive = 2.0
    """A grammar that takes longer to compile is refused."""
    drain_s: PositiveOrZero = 30.0
    codec_library: str = ""
    """File of profiles that were measured for this model (``microserve profile``), by which KV may be sent in
    fewer bytes. Empty: only those that lose nothing and are built in."""
    codec_threads: CountOrZero = 1
    """That encode KV, and as many that decode it, beside the steps; 0: KV is sent and taken as it is."""
    codec_min_quality: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.97
    """Least score of a profile that loses and that the engine may choose by itself (``codec="auto"``), as a
    share of what the model's answers are worth with KV as it is."""

    def check_cluster(self) -> None:
        """Raises :class:`ConfigError` for what could not be a label either."""
        if self.cluster and fault_of_labels([self.cluster]):
            raise ConfigError(
                f"engine.cluster must be a name as labels are, at most {MAX_LABEL_CHARS} printable "
                f"characters without spaces, is {self.cluster!r}",
                field="engine.cluster",
            )

    def check_advertise(self) -> None:
        """Raises :class:`ConfigError` for what nobody can connect to."""
        host = self.advertise
        if host and (not _HOST.fullmatch(host) or host.strip("[]") in _EVERYWHERE):
            raise ConfigError(
                "engine.advertise must be a host, by name or number, without a port, that others can connect "
                f"to, is {host!r}",
                field="engine.advertise",
            )


class KvCacheSettings(Section, frozen=True):
    heap: str = "auto"
    """``shm`` on a CPU; memory of a GPU: ``cuda_ipc``, or ``nvshmem``, which has a section of its own.
    ``auto``: ``shm`` or ``cuda_ipc``, as the device is. Only engines with the same exchange KV."""
    block_size: Annotated[int, Meta(gt=0, le=4096)] = 16
    """Tokens."""
    num_blocks: Annotated[int, Meta(ge=0, le=(1 << 31) - 1)] = 0
    """Of the pool. 0: by the memory that is left at the start: of a quarter of this machine's, or nine tenths
    of a GPU's, an engine's part (``mesh.engines``). More than fit are refused with the number that would."""
    grant_slots: Count = 256
    lease_s: Positive = 30.0
    checksums: bool = False
    """Verify every received block by checksum before first use."""
    doors: list[str] = msgspec.field(default_factory=list)
    """``tcp``, ``nixl``: through what engines of other hosts put KV into this one, best first. Empty: only
    those of this host do."""
    door_address: str = "tcp://127.0.0.1:0"
    """Where a door is, as other hosts reach it; port 0: any."""
    door_silence_s: Positive = 10.0
    """A writer on another host that says nothing for so long is torn down, and its blocks are free."""
    share_memory: bool = True
    """Engines of one host put KV into each other's memory; false: through doors, like those of others."""

    def check_doors(self, heap: str, *, is_guarded: bool) -> None:
        """``heap``: its kind; ``is_guarded``: grants are told to nobody else. Raises :class:`ConfigError`."""
        fault, field = "", "kvcache.doors"
        if unknown := [kind for kind in self.doors if kind not in DOOR_KINDS]:
            fault = f"must be of {', '.join(map(repr, DOOR_KINDS))}, has {unknown[0]!r}"
        elif self.doors and heap != "shm":
            fault = f"must be empty for kvcache.heap {heap!r}: doors lead into a host's memory"
        elif len(set(self.doors)) < len(self.doors):
            fault = "must name each kind once"
        elif not self.doors and not self.share_memory:
            fault = "must name a door where kvcache.share_memory is false"
        elif not self.door_address.startswith("tcp://"):
            fault, field = f"must be tcp://HOST:PORT, is {self.door_address!r}", "kvcache.door_address"
        elif self.door_address.removeprefix("tcp://").rpartition(":")[0].strip("[]") in _EVERYWHERE:
            field = "kvcache.door_address"
            fault = f"must be the address by which other hosts reach this one, is {self.door_address!r}"
        elif self.doors and not is_guarded and not _LOOPBACK.match(self.door_address):
            field = "kvcache.door_address"
            fault = (
                "is reachable from other machines, and its secret travels in grants: set bus.curve_dir (or "
            )
            fault += "say bus.insecure = true)"
        if fault:
            raise ConfigError(f"{field} {fault}", field=field)


class NvshmemSettings(Section, frozen=True):
    """Which world an engine joins, as which rank; for ``kvcache.heap = "nvshmem"``."""

    world: str = ""
    """Name that all engines of the world share, and no other world of the mesh."""
    rank: CountOrZero = 0
    """Of this engine: each of 0 to ``num_ranks - 1`` once."""
    num_ranks: CountOrZero = 0
    memory_mb: Annotated[int, Meta(ge=0, le=1 << 24)] = 0
    """Device memory that every rank takes, the same for all: room for the largest pool among them."""
    join_timeout_s: Annotated[float, Meta(gt=0, le=1_000_000)] = 120.0
    """From the model's being loaded until all ranks are there and have their heaps; then the process ends."""

    def check(self, *, curve_dir: str) -> None:
        """For an engine that is to have such a heap. Raises :class:`ConfigError` naming the path."""
        if fault := fault_of_world(self.world):
            raise ConfigError(f"nvshmem.world: {fault}", field="nvshmem.world")
        if not 1 <= self.num_ranks <= MAX_WORLD_RANKS:
            raise ConfigError(
                f"nvshmem.num_ranks must be 1 to {MAX_WORLD_RANKS}, is {self.num_ranks}",
                field="nvshmem.num_ranks",
            )
        if not 0 <= self.rank < self.num_ranks:
            raise ConfigError(
                f"nvshmem.rank must be 0 to {self.num_ranks - 1}, is {self.rank}", field="nvshmem.rank"
            )
        if self.memory_mb <= 0:
            raise ConfigError(
                f"nvshmem.memory_mb must be above 0 for kvcache.heap 'nvshmem', is {self.memory_mb}",
                field="nvshmem.memory_mb",
            )
        if not curve_dir:
            raise ConfigError(
                "bus.curve_dir must be set for kvcache.heap 'nvshmem': a world's unique id travels over "
                "authenticated sockets only (see 'microserve keys')",
                field="bus.curve_dir",
            )
