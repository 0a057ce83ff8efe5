"""From a transformers model to a packed one: which ones the native step computes, and what comes over.

Owns that mapping. Must not know batches, sampling or files.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from microserve.kernels.cpu.library import Library, choose_variant, library
from microserve.kernels.cpu.packing import LayerWeights, pack
from microserve.kernels.cpu.weights import MAX_GROUP, Shape
from microserve.kernels.kernel_cache import KernelUnavailable
from microserve.services.engine.model.directory.families import NATIVE
from microserve.services.engine.model.model import LoadedModel
from microserve.services.engine.model.rope import rope_tables
from microserve.services.engine.model.spec import ModelSpec
from microserve.services.engine.native.kernels import Kernels
from microserve.services.engine.native.packed_model import PackedModel
from microserve.services.engine.native.runner import NativeRunner


def missing(model: LoadedModel) -> str | None:
    """What of the model the native step does not compute; None: nothing."""
    spec, module = model.spec, model.module
    config: Any = module.config
    if config.model_type not in NATIVE:  # whose layers have what it would leave out
        return f"models of the family {config.model_type}"
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


def pack_model(model: LoadedModel, found: Library, weights: str = "dtype") -> PackedModel:
    """weights: one of ``WEIGHTS``. In memory of this process; the model is not needed afterwards. Raises
    :class:`KernelUnavailable` with what is missing."""
    if (what := missing(model)) is not None:
        raise KernelUnavailable(f"it does not compute {what}")
    spec, decoder = _spec_of(model.spec, weights), _decoder(model.module)
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
        scale=float(decoder.layers[0].self_attn.scaling),
        weights=weights,
    )
    cos, sin = rope_tables(decoder.rotary_emb, spec.max_model_len)
    head, embedding = model.module.lm_head.weight, decoder.embed_tokens.weight  # type: ignore[union-attr]
    is_tied = head is embedding or head.data_ptr() == embedding.data_ptr()  # type: ignore[operator]
    packed = pack(
        found,
        shape,
        [_weights(layer) for layer in decoder.layers],
        embedding=embedding,
        head=None if is_tied else head,  # type: ignore[arg-type]
        norm=decoder.norm.weight,
        cos=torch.from_numpy(cos),
        sin=torch.from_numpy(sin),
    )
    return PackedModel(spec, shape, packed, hashlib.sha256(cos.tobytes() + sin.tobytes()).hexdigest())


def _spec_of(spec: ModelSpec, weights: str) -> ModelSpec:
    """Rounded weights make another K and V: another model, for whoever shares KV."""
    if weights == "dtype":
        return spec
    told = hashlib.sha256(f"{spec.revision} {weights}".encode())
    return replace(spec, revision=told.hexdigest()[: len(spec.revision)])


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


def native_runner(
    model: LoadedModel,
    kv_data: npt.NDArray[np.uint8],
    num_blocks: int,
    block_size: int,
    *,
    threads: int,
    max_rows: int,
    variant: str = "auto",
    weights: str = "dtype",
) -> NativeRunner:
    """A runner of a model that is packed for it alone. Raises :class:`KernelUnavailable`."""
    found = library()
    kernels = Kernels(found, choose_variant(found, variant, model.spec.dtype, weights))
    packed = pack_model(model, found, weights)
    return NativeRunner(packed, kernels, kv_data, num_blocks, block_size, threads=threads, max_rows=max_rows)
