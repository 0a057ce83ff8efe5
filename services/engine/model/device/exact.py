"""A transformers model on a GPU with bits of our own: which parts of its module are replaced, and the class.

What has a sum in it, or a function that a library may compute in several ways, is one of ``kernels/exact``:
linear layers and the head, norms, the activation, attention; RoPE is looked up in tables. What torch is left
with copies values or rounds once (rows of the embedding, a sum of two, a product of two), which has one
result on any machine. So a row's bits do not depend on its company: not on rows, order, chunks, or graphs.

Owns that, and which models it can be had for. Must not know batches or sampling (``runner.py``,
``device_sampler.py``), nor how the kernels compute.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from microserve.kernels.exact.launch import kernels_digest
from microserve.protocol.errors import ConfigError
from microserve.protocol.messages.numerics import Numerics
from microserve.services.engine.model.directory.families import NATIVE
from microserve.services.engine.model.model import DTYPES, LoadedModel
from microserve.services.engine.model.rope import Floats, rope_tables

FIELD = "engine.cuda_exact"


class ExactLinear(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        from microserve.kernels.exact.triton_product import product

        return product(x, self.weight, self.bias)


class ExactNorm(nn.Module):
    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, float(norm.variance_epsilon)

    def forward(self, x: Tensor) -> Tensor:
        from microserve.kernels.exact.triton_rows import rms_norm

        return rms_norm(x, self.weight, self.eps)


class ExactSilu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        from microserve.kernels.exact.triton_rows import silu

        return silu(x)


class ExactRotary(nn.Module):
    """Rows of tables that the host has computed, in the model's dtype."""

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        super().__init__()
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        cos: Any = self.cos
        sin: Any = self.sin
        return cos[position_ids], sin[position_ids]


def make_exact(model: LoadedModel) -> LoadedModel:
    """The model with its module's parts replaced, in place, and its numerics class.

    Raises :class:`ConfigError` for a module with parts that are not known, and where there is no Triton.
    """
    if importlib.util.find_spec("triton") is None:
        raise ConfigError(f"{FIELD} needs Triton, which is not installed", field=FIELD)
    module: Any = model.module
    if module.config.model_type not in NATIVE:  # whose parts may be called as ours are and be others
        raise ConfigError(f"{FIELD} does not know the family {module.config.model_type}", field=FIELD)
    device = module.lm_head.weight.device
    tables = rope_tables(module.model.rotary_emb.to("cpu"), model.spec.max_model_len)
    known = _known(model, tables, device)
    named = module.named_modules(remove_duplicate=False)
    parts = {name: _part(name, part, known) for name, part in named if _is_leaf(part)}
    for name, part in parts.items():
        module.set_submodule(name, part)
    return replace(model, numerics=Numerics(class_name(model, tables, device), is_exact=True))


def class_name(model: LoadedModel, tables: tuple[Floats, Floats], device: torch.device) -> str:
    """Equal names: equal bits. Devices of one architecture run the same machine code."""
    kind = "interpreted"
    if device.type == "cuda":
        kind = "sm{}{}".format(*torch.cuda.get_device_capability(device))
    told = hashlib.sha256(f"{kernels_digest()} {kind} {model.spec.revision}".encode())
    # What is done in which order is transformers'; each step of it that is left to torch has one result.
    told.update(f"transformers {version('transformers')}".encode())
    for table in tables:
        told.update(table.tobytes())
    return f"triton-{kind}-{model.spec.dtype}-{told.hexdigest()[:12]}"


def _is_leaf(part: nn.Module) -> bool:
    return not any(True for _ in part.children()) or isinstance(part, nn.Linear)


def _known(
    model: LoadedModel, tables: tuple[Floats, Floats], device: torch.device
) -> dict[str, Callable[[Any], nn.Module]]:
    """By the ends of parts' class names: what takes their place."""
    dtype = DTYPES[model.spec.dtype]
    halves = [torch.from_numpy(table) for table in tables]
    cos, sin = (torch.cat((half, half), dim=-1).to(dtype).to(device) for half in halves)
    return {
        "Embedding": lambda part: part,
        "RotaryEmbedding": lambda _: ExactRotary(cos, sin),
        "Linear": ExactLinear,
        "RMSNorm": ExactNorm,
        "SiLU": lambda _: ExactSilu(),
        "SiLUActivation": lambda _: ExactSilu(),
    }


def _part(name: str, part: nn.Module, known: dict[str, Callable[[Any], nn.Module]]) -> nn.Module:
    kind = type(part).__name__
    # The longest end that fits: a RotaryEmbedding is an Embedding by name.
    ends = sorted((end for end in known if kind.endswith(end)), key=len)
    if not ends:
        raise ConfigError(f"{FIELD} does not know {name}, a {kind}", field=FIELD)
    return known[ends[-1]](part)
