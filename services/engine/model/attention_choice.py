"""Which kernels an engine's attention runs on: decided once, at its start.

Owns that decision and its events. FlashInfer compiles here and not in somebody's step, and serves only after
the results of one step were held against the plain ones. Must not know the runner nor the scheduler.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import structlog
import torch
from torch import Tensor

from microserve.kernels import reference
from microserve.kernels.attention.paged_attention import Span
from microserve.kernels.scatter.kv_scatter import missing_kernel
from microserve.protocol import log
from microserve.protocol.errors import ConfigError
from microserve.services.engine.model.attention import flashinfer as flashinfer_attention
from microserve.services.engine.model.attention.flashinfer import FlashInfer, PrefillWrapper, load_flashinfer
from microserve.services.engine.model.attention.step import MakeAttention, device_attention, exact_attention
from microserve.services.engine.model.model import DTYPES
from microserve.services.engine.model.spec import ModelSpec

_logger = structlog.get_logger()

_BOUNDS = {torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Of outputs of values around 1: a few roundings of the dtype."""

EXACT = "exact"
"""No word of ``engine.attention``: what goes with an exact model (``exact.py``)."""

MakeWrapper = Callable[[], PrefillWrapper]


class WrongResult(Exception):
    """Kernels ran and did not compute attention."""


def choose_attention(
    wanted: str, spec: ModelSpec, block_size: int, device: torch.device
) -> MakeAttention | None:
    """The attention of ``engine.attention``; None on a CPU, where the runner knows.

    wanted: ``auto``, ``triton``, ``flashinfer``, or :data:`EXACT`. May compile for minutes. Raises
    :class:`ConfigError` where ``flashinfer`` was asked for and cannot be had.
    """
    if device.type != "cuda":
        return None
    device = torch.device("cuda", device.index or 0)
    with torch.cuda.device(device):
        if (detail := missing_kernel(device)) is not None:
            _logger.warning(log.KERNEL_MISSING, kernel="block_scatter", instead="triton", detail=detail)
        loads: dict[str, Callable[[], MakeWrapper]] = {}
        if importlib.util.find_spec("flashinfer") is not None:
            shape = (spec.num_heads, spec.num_kv_heads, spec.head_dim)
            # What it would take for Hopper by itself needs more of the CUDA toolkit to compile.
            backends = ["fa3", "fa2"] if torch.cuda.get_device_capability(device) == (9, 0) else ["fa2"]
            for backend in backends:
                loads[f"flashinfer-{backend}"] = partial(load_flashinfer, device, *shape, backend)
        return choose_kernels(wanted, spec, block_size, device, loads)


def choose_kernels(
    wanted: str,
    spec: ModelSpec,
    block_size: int,
    device: torch.device,
    loads: Mapping[str, Callable[[], MakeWrapper]],
) -> MakeAttention:
    """As ``choose_attention``; loads: FlashInfer's kernels, best first, each with what imports it."""
    if wanted == EXACT:
        return _chosen(exact_attention, "exact", "engine.cuda_exact")
    if wanted == "triton":
        return _chosen(device_attention, "triton", "engine.attention")
    why = _misfit(spec) or (None if loads else "FlashInfer is not installed")
    if why is None:
        names = [*loads, "triton"]
        for (name, load), instead in zip(loads.items(), names[1:], strict=True):
            try:
                make_wrapper = load()
                try_out(FlashInfer(make_wrapper), spec, block_size, device)
            except Exception as error:  # whatever its import, its compiler, its kernels raise
                why = _in_one_line(error)
                if wanted == "auto" or instead != "triton":
                    _logger.warning(log.KERNEL_MISSING, kernel=name, instead=instead, detail=why)
            else:
                return _chosen(FlashInfer(make_wrapper), name, None)
    if wanted == "flashinfer":
        raise ConfigError(f"engine.attention 'flashinfer' cannot be had: {why}", field="engine.attention")
    return _chosen(device_attention, "triton", why)


def _in_one_line(error: Exception) -> str:
    """The compiler's first error where its whole output is in the message, else the first line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    line = next((line for line in lines if " error: " in line), lines[0])
    return f"{type(error).__name__}: {line}"[:500]


def _chosen(make: MakeAttention, name: str, why: str | None) -> MakeAttention:
    _logger.info(log.ATTENTION_CHOSEN, attention=name, why=why)
    return make


def _misfit(spec: ModelSpec) -> str | None:
    """Why FlashInfer does not do this model."""
    if spec.dtype not in flashinfer_attention.DTYPES:
        return f"model.dtype {spec.dtype} is none of {', '.join(flashinfer_attention.DTYPES)}"
    if spec.head_dim not in flashinfer_attention.HEAD_DIMS:
        return f"head_dim {spec.head_dim} is none of {', '.join(map(str, flashinfer_attention.HEAD_DIMS))}"
    return None


def try_out(make: MakeAttention, spec: ModelSpec, block_size: int, device: torch.device) -> None:
    """One step of a decode and a chunk for each kind of layer, against the plain attention.

    Raises :class:`WrongResult`, and whatever the kernels raise.
    """
    dtype = DTYPES[spec.dtype]
    generator = torch.Generator().manual_seed(1)
    decode = Span(1, block_size + max(1, block_size // 2), [3, 1])
    chunk = Span(2 * block_size + 1, 3 * block_size + 1, [0, 6, 2, 5])
    spans, num_tokens = [decode, chunk], decode.query_len + chunk.query_len

    def rows(num_rows: int, num_heads: int) -> Tensor:
        return torch.randn(num_rows, num_heads, spec.head_dim, generator=generator).to(dtype)

    def slots(span: Span, begin: int, end: int) -> list[int]:
        places = range(begin, end)
        return [span.block_table[place // block_size] * block_size + place % block_size for place in places]

    # What no sequence holds is NaN, which must not reach a result.
    shape = (7, 2, block_size, spec.num_kv_heads, spec.head_dim)
    kv = torch.full(shape, float("nan"), dtype=dtype)
    new: list[int] = []
    for span in spans:
        old = span.context_len - span.query_len
        keys, values = (rows(old, spec.num_kv_heads) for _ in range(2))
        reference.write_kv(kv, keys, values, torch.tensor(slots(span, 0, old)))
        new += slots(span, old, span.context_len)
    key, value = (rows(num_tokens, spec.num_kv_heads) for _ in range(2))
    query, scale = rows(num_tokens, spec.num_heads), spec.head_dim**-0.5
    on_device = kv.clone().to(device)
    step = make(spans, np.array(new, dtype=np.int64), on_device)
    step.write(on_device, key.to(device), value.to(device))
    reference.write_kv(kv, key, value, torch.tensor(new))
    for longest in spec.sliding_windows:
        window = None if longest is None else min(longest, block_size + 1)  # so that it hides something
        out = step.attend(query.to(device), on_device, scale=scale, sliding_window=window).cpu().float()
        want = reference.paged_attention(query, kv, spans, scale=scale, sliding_window=window).float()
        bound = _BOUNDS[dtype]
        if not torch.allclose(out, want, atol=bound, rtol=bound):
            error = (out - want).abs().max().item()
            raise WrongResult(f"off by {error:.2g} with sliding_window {window}, at most {bound} is right")
