"""A transformers model on the native CPU step: which ones it can compute, and how their weights come over.

Owns that mapping, the RoPE tables and the numerics class's name. Must not know batches or sampling
(``runner.py``); the kernels are in ``kernels/cpu``.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import structlog
import torch
from torch import Tensor, nn

from microserve.kernels.cpu.library import Library, choose_variant, library
from microserve.kernels.cpu.step import MAX_GROUP, MAX_THREADS, CpuStep, LayerWeights, Shape
from microserve.kernels.kernel_cache import KernelUnavailable
from microserve.protocol import log
from microserve.protocol.errors import ConfigError
from microserve.protocol.messages.numerics import Numerics
from microserve.protocol.settings import Settings
from microserve.services.engine.model.model import LoadedModel
from microserve.services.engine.model.runner import MakeStep

_logger = structlog.get_logger()


def missing(model: LoadedModel) -> str | None:
    """What of the model the native step does not compute; None: nothing."""
    spec, module = model.spec, model.module
    config: Any = module.config
    if spec.dtype not in ("bfloat16", "float32"):
        return f"model.dtype {spec.dtype}"
    if (activation := getattr(config, "hidden_act", "silu")) not in ("silu", "swish"):
        return f"the activation {activation}"
    if spec.num_heads // spec.num_kv_heads > MAX_GROUP:
        return f"{spec.num_heads // spec.num_kv_heads} query heads for a KV head, more than {MAX_GROUP}"
    decoder: Any = module.model
    if 2 * len(decoder.rotary_emb.inv_freq) != spec.head_dim:
        return "RoPE over a part of a head"
    for layer in decoder.layers:
        if layer.mlp.gate_proj.bias is not None or layer.mlp.down_proj.bias is not None:
            return "biases of an MLP"
        norms = [layer.input_layernorm, layer.post_attention_layernorm]
        norms += [
            getattr(layer.self_attn, name) for name in ("q_norm", "k_norm") if hasattr(layer.self_attn, name)
        ]
        if any(norm.variance_epsilon != decoder.norm.variance_epsilon for norm in norms):
            return "norms of several epsilons"
    if getattr(module.lm_head, "bias", None) is not None:
        return "a bias of the head"
    return None


def choose_step(settings: Settings, model: LoadedModel) -> MakeStep | None:
    """The step of ``engine.cpu_kernels``; None: transformers computes, and so it does where the step that is
    returned gives None. May compile for half a minute.

    Both raise :class:`ConfigError` where a variant was asked for and cannot be had.
    """
    wanted = settings.engine.cpu_kernels
    if settings.engine.device != "cpu" or wanted == "transformers":
        return None
    try:
        if (what := missing(model)) is not None:
            raise KernelUnavailable(f"it does not compute {what}")
        variant = choose_variant(library(_tell), wanted, model.spec.dtype)
    except KernelUnavailable as error:
        _go_without(wanted, error)
        return None
    max_rows = max(settings.engine.max_num_batched_tokens, settings.engine.max_num_seqs)
    threads = min(settings.engine.threads, MAX_THREADS)

    def make(layers: list[Tensor]) -> tuple[CpuStep, Numerics] | None:
        try:
            return make_step(model, layers, threads=threads, max_rows=max_rows, variant=variant)
        except KernelUnavailable as error:  # no memory or no thread for it: the module still has its weights
            _go_without(wanted, error)
            return None

    return make


def _go_without(wanted: str, error: KernelUnavailable) -> None:
    if wanted != "auto":
        raise ConfigError(
            f"engine.cpu_kernels {wanted!r} cannot be had: {error}", field="engine.cpu_kernels"
        ) from None
    _logger.warning(log.KERNEL_MISSING, kernel="cpu_step", instead="transformers", detail=str(error))


def _tell(what: str) -> None:
    _logger.info(log.KERNEL_AWAITED, kernel="cpu_step", detail=what)


def make_step(
    model: LoadedModel,
    layers: list[Tensor],
    *,
    threads: int,
    max_rows: int,
    variant: str = "auto",
) -> tuple[CpuStep, Numerics]:
    """The model packed for its pool, and its numerics class.

    layers: [num_blocks, 2, block_size, num_kv_heads, head_dim] each. Raises :class:`KernelUnavailable` with
    what is missing.
    """
    if (what := missing(model)) is not None:
        raise KernelUnavailable(f"the native step does not compute {what}")
    found = library()
    spec, decoder = model.spec, _decoder(model.module)
    num_blocks, _, block_size, _, _ = layers[0].shape
    attention = decoder.layers[0].self_attn
    shape = Shape(
        elem=spec.dtype,
        num_layers=spec.num_layers,
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        hidden=decoder.embed_tokens.weight.shape[1],
        intermediate=decoder.layers[0].mlp.gate_proj.weight.shape[0],
        vocab=spec.vocab_size,
        eps=float(decoder.norm.variance_epsilon),
        scale=float(attention.scaling),
        block_size=block_size,
        num_blocks=num_blocks,
        max_rows=max_rows,
        max_context=min(spec.max_model_len, num_blocks * block_size),
        max_logits=max_rows,
    )
    step = CpuStep(found, choose_variant(found, variant, spec.dtype), shape, threads)
    for index, (layer, kv) in enumerate(zip(decoder.layers, layers, strict=True)):
        step.set_layer(index, _weights(layer), kv)
    # Of all positions, however many the pool holds: its size is no part of the class.
    tables = rope_tables(decoder.rotary_emb, spec.max_model_len)
    cos, sin = (table[: shape.max_context] for table in tables)
    head, embedding = model.module.lm_head.weight, decoder.embed_tokens.weight  # type: ignore[union-attr]
    is_tied = head is embedding or head.data_ptr() == embedding.data_ptr()  # type: ignore[operator]
    step.set_model(embedding, None if is_tied else head, decoder.norm.weight, cos, sin)  # type: ignore[arg-type]
    return step, Numerics(class_name(found, step.recipe, model, *tables), is_exact=True)


def class_name(found: Library, recipe: str, model: LoadedModel, cos: Tensor, sin: Tensor) -> str:
    """Equal names: equal bits. Variants and threads are not in it; recipe, weights and object are."""
    told = hashlib.sha256(f"{found.digest} {model.spec.revision}".encode())
    # Tables are the mathematical library's, whose last bit is not the same everywhere.
    for table in (cos, sin):
        told.update(table.numpy().tobytes())
    return f"{recipe}-{model.spec.dtype}-{told.hexdigest()[:12]}"


def rope_tables(rotary: Any, num_positions: int) -> tuple[Tensor, Tensor]:
    """cos and sin [num_positions, head_dim / 2], float32: of angles as transformers makes them."""
    positions = np.arange(num_positions, dtype=np.float32)
    angles = np.outer(positions, rotary.inv_freq.float().numpy()).astype(np.float64)
    scale = np.float32(rotary.attention_scaling)
    tables = (np.cos(angles).astype(np.float32) * scale, np.sin(angles).astype(np.float32) * scale)
    return torch.from_numpy(tables[0]), torch.from_numpy(tables[1])


def _decoder(module: nn.Module) -> Any:
    return module.model


def _weights(layer: Any) -> LayerWeights:
    attention, mlp = layer.self_attn, layer.mlp
    matrices = {name: getattr(attention, f"{name}_proj").weight for name in ("q", "k", "v", "o")}
    matrices |= {name: getattr(mlp, f"{name}_proj").weight for name in ("gate", "up", "down")}
    vectors = {
        "attention_norm": layer.input_layernorm.weight,
        "mlp_norm": layer.post_attention_layernorm.weight,
    }
    for name in ("q", "k", "v", "o"):
        if (bias := getattr(attention, f"{name}_proj").bias) is not None:
            vectors[f"{name}_bias"] = bias
    for name in ("q_norm", "k_norm"):
        if hasattr(attention, name):
            vectors[name] = getattr(attention, name).weight
    return LayerWeights(
        matrices,
        vectors,
        use_rope=bool(getattr(attention, "use_rope", True)),
        window=_window(attention),
    )


def _window(attention: Any) -> int | None:
    """Mistral's layers ask their config, the others' know it."""
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window  # type: ignore[no-any-return]
    return getattr(attention.config, "sliding_window", None)
