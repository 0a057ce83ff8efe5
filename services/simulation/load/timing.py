"""How long an engine's step and a put take: a model with named constants, and where each of them is from.

A :class:`Profile` is one kind of engine. Two kinds are here: fitted to measurements (``cpu``), and computed
from a model's shape and a device's data sheet (``roofline``). The second is no measurement, and its share of
the peak that a real engine reaches is an assumption, named as such. Pure arithmetic; knows no mesh.

    step_s    overhead + max(tokens * token_s, floor_s) + pairs * pair_s + contexts * context_s
    put_s     latency + bytes / rate

A step reads all weights once (``floor_s``) and computes each token (``token_s``), whichever takes longer; a
prefill attends to ``pairs`` of (new token, earlier token), a decode reads the KV of its whole context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from microserve.protocol.errors import ConfigError


@dataclass(frozen=True)
class Profile:
    """One kind of engine. Times in seconds, sizes in bytes."""

    name: str
    source: str
    """What the constants are from, for whoever reads a result."""
    overhead_s: float
    """Of every step, whatever is in it."""
    floor_s: float
    """Least time of a step's matrix products: all weights are read once."""
    token_s: float
    """Of each token's matrix products."""
    pair_s: float
    """Of each pair of a prefill's token and one that it attends to."""
    context_s: float
    """Of each token of KV that a decode reads."""
    kv_nbytes_per_token: int
    num_kv_tokens: int
    """KV tokens that an engine has room for."""
    link_nbytes_per_s: float
    """Of puts from one engine to another; each engine sends one and receives one at a time."""
    link_latency_s: float
    """Of each put."""
    overlaps: bool
    """Is a layer put while the next one is computed? Otherwise the step thread itself copies."""

    def step_s(
        self, prefills: Sequence[tuple[int, int]], contexts: Sequence[int], num_passes: int = 1
    ) -> float:
        """Forward passes that share the tokens of ``prefills`` and each decode all of ``contexts``.

        prefills: (tokens, tokens before them) of each; contexts: tokens that each decode attends to.
        """
        num_tokens = sum(length for length, _ in prefills) / num_passes + len(contexts)
        pairs = sum(length * start + length * (length + 1) / 2 for length, start in prefills)
        pass_s = (
            self.overhead_s + max(num_tokens * self.token_s, self.floor_s) + sum(contexts) * self.context_s
        )
        return num_passes * pass_s + pairs * self.pair_s

    def put_s(self, num_tokens: float) -> float:
        """KV of so many tokens, or of a layer's share of them."""
        return self.link_latency_s + num_tokens * self.kv_nbytes_per_token / self.link_nbytes_per_s


# --- from data sheets ------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelShape:
    """A dense decoder with grouped-query attention, two bytes a number."""

    num_params: float
    num_embedding_params: float
    """Looked up and not multiplied."""
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def kv_nbytes_per_token(self) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * 2


@dataclass(frozen=True)
class Device:
    """By its data sheet."""

    flops: float
    """Dense bf16 floating point operations a second."""
    memory_nbytes_per_s: float
    memory_nbytes: float
    link_nbytes_per_s: float


LLAMA_8B = ModelShape(8.03e9, 0.53e9, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128)
"""Meta-Llama-3.1-8B: its config.json (hidden size 4096, vocabulary 128,256) and model card."""
H200 = Device(989e12, 4.8e12, 141e9, 49.5e9)
"""NVIDIA H200 SXM data sheet: 989 TFLOP/s bf16 dense (half of the figure "with sparsity"), 4.8 TB/s, 141 GB.
Link: one 400 Gb/s NIC a GPU, 49.5 GB/s as llm-d measured with nixlbench over UCX (2026-06)."""
A100 = Device(312e12, 2.039e12, 80e9, 24.0e9)
"""NVIDIA A100 80GB SXM data sheet: 312 TFLOP/s bf16 dense, 2,039 GB/s, 80 GB. Link: one 200 Gb/s NIC a GPU,
at the share of its rate that the H200's reaches."""

COMPUTE_SHARE = 0.6
"""ASSUMED: share of peak FLOP/s that a prefill's matrix products reach."""
ATTENTION_SHARE = 0.4
"""ASSUMED: share of peak FLOP/s that a prefill's attention reaches."""
MEMORY_SHARE = 0.8
"""ASSUMED: share of peak memory bandwidth that a decode reaches."""
STEP_OVERHEAD_S = 0.002
"""ASSUMED: scheduling, launches and sampling of one step."""
PUT_LATENCY_S = 20e-6
"""ASSUMED: of one one-sided write; a few microseconds of wire and the posting of a batch."""
KV_MEMORY_SHARE = 0.9
"""ASSUMED: of the device's memory, what weights and KV may take together."""


def roofline(name: str, shape: ModelShape, device: Device) -> Profile:
    """No measurement: what the data sheets allow, times the shares assumed above."""
    weights_nbytes = 2 * shape.num_params
    multiplied = shape.num_params - shape.num_embedding_params
    pair_flops = 4 * shape.num_layers * shape.num_heads * shape.head_dim
    memory_rate = MEMORY_SHARE * device.memory_nbytes_per_s
    kv_nbytes = KV_MEMORY_SHARE * device.memory_nbytes - weights_nbytes
    return Profile(
        name,
        "a model from data sheets, not a measurement",
        overhead_s=STEP_OVERHEAD_S,
        floor_s=2 * multiplied / memory_rate,
        token_s=2 * multiplied / (COMPUTE_SHARE * device.flops),
        pair_s=pair_flops / (ATTENTION_SHARE * device.flops),
        context_s=shape.kv_nbytes_per_token / memory_rate,
        kv_nbytes_per_token=shape.kv_nbytes_per_token,
        num_kv_tokens=int(kv_nbytes / shape.kv_nbytes_per_token),
        link_nbytes_per_s=device.link_nbytes_per_s,
        link_latency_s=PUT_LATENCY_S,
        overlaps=True,
    )


# --- measured --------------------------------------------------------------------------------------

# <fitted by benchmarks/engine/step_time.py>
CPU = Profile(
    "cpu",
    "fitted to steps of this project's CPU engine, measured with benchmarks/engine/step_time.py",
    overhead_s=0.00584,
    floor_s=0.00368,
    token_s=0.00092,
    pair_s=4.82e-07,
    context_s=2.88e-06,
    kv_nbytes_per_token=23040,
    num_kv_tokens=2048 * 16,
    link_nbytes_per_s=5910000000.0,
    link_latency_s=1e-4,
    overlaps=False,
)
"""SmolLM2-135M-Instruct, bfloat16, the native step (avx512bf16), one thread of AMD EPYC,
2026-11-29, in CPU time. The fit misses a kind of step by 7% on the average, and by 44% at
most (prefill 2 behind 4096)."""
# </fitted>
# Room for KV: 2,048 blocks. ASSUMED: a put's latency (Python around one memcpy).


# --- all of them -----------------------------------------------------------------------------------

PROFILES = {
    profile.name: profile
    for profile in (
        CPU,
        roofline("h200-8b", LLAMA_8B, H200),
        roofline("a100-8b", LLAMA_8B, A100),
    )
}


def profile_of(name: str) -> Profile:
    """Raises :class:`ConfigError` for a name that is not in :data:`PROFILES`."""
    if name not in PROFILES:
        raise ConfigError(f"no profile {name!r} (there are: {', '.join(sorted(PROFILES))})", field="profile")
    return PROFILES[name]
