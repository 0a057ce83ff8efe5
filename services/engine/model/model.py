"""A transformers causal LM whose attention reads and writes the paged pool.

Owns loading (what is served is right, or is refused here), and the one attention function that every layer
calls. No model is re-typed: transformers' modules compute everything else. Must not know batches, sampling or
scheduling (``runner.py``).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights
from transformers.utils import logging as transformers_logging

from microserve.protocol.errors import ConfigError, InternalError
from microserve.protocol.messages.numerics import Numerics
from microserve.services.engine.model.attention.step import StepAttention
from microserve.services.engine.model.directory.end_tokens import eos_of
from microserve.services.engine.model.directory.families import (
    HYBRID,
    foreign_layers,
    foreign_rope,
    refusal_of,
    rope_of,
)
from microserve.services.engine.model.directory.model_files import read_json
from microserve.services.engine.model.revision import own_memory, revision_of
from microserve.services.engine.model.spec import ModelSpec
from microserve.services.engine.model.state.mixing import StepStates, install
from microserve.services.engine.model.state.placing import state_of

ATTENTION = "microserve_paged"
"""Our name in transformers' registry of attention functions."""

STEP = "microserve_step"
"""Keyword of ``module(...)`` that carries the :class:`AttentionStep` to every layer."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_NOT_COMPUTED = ("softcap", "s_aux", "position_bias")
"""What attention may be asked for besides: leaving it out would give other tokens."""
# Buffers that older checkpoints carry and modules compute by themselves.
_HARMLESS_SUFFIXES = (".rotary_emb.inv_freq", ".masked_bias", ".attn.bias")


@dataclass(frozen=True, slots=True)
class LoadedModel:
    spec: ModelSpec
    module: nn.Module
    """transformers' ``...ForCausalLM``; callable only with an :class:`AttentionStep` under ``STEP``."""
    numerics: Numerics | None = None
    """Of a module whose parts are our own (``exact.py``); None: of the libraries that it comes with."""


@dataclass(frozen=True, slots=True)
class AttentionStep:
    """What the attention function needs of the step that is running."""

    layers: list[Tensor]
    """Per layer of the model [num_blocks, 2, block_size, num_kv_heads, head_dim], views on the heap; what
    stands for a layer without KV is not asked for."""
    attention: StepAttention
    on_layer: Callable[[int], None] | None
    """Called with the layer's index when its new KV is written, or enqueued in the stream, and before any is
    read."""
    states: StepStates | None = None
    """Of a hybrid model's sequences."""


def load_model(
    path: str | Path, *, dtype: str, device: str = "cpu", load_format: str = "auto"
) -> LoadedModel:
    """Load a model directory (config.json, safetensors).

    dtype: ``float32``, ``bfloat16`` or ``float16``; load_format: ``auto``, or ``random`` for weights made
    from config.json alone, on ``device`` itself: the same on every engine of one kind of device, but other
    ones on a GPU than on a CPU, whose generators differ. Raises :class:`ConfigError` naming the setting, or
    the part of the model that would not be served right.
    """
    directory = Path(path)
    if dtype not in DTYPES:
        raise ConfigError(f"model.dtype is {dtype!r}, must be one of {sorted(DTYPES)}", field="model.dtype")
    if load_format not in ("auto", "random"):
        raise ConfigError(
            f"model.load_format is {load_format!r}, must be 'auto' or 'random'", field="model.load_format"
        )
    raw = read_json(directory / "config.json")
    if why := refusal_of(raw):
        raise _refusal(directory, why)
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # whatever transformers' validators raise, the fault is the directory's
        raise _refusal(directory, f"config.json: {error}") from error
    _check_supported(directory, config)
    transformers_logging.disable_progress_bar()
    module = None if load_format == "random" else _pretrained(directory, dtype)
    try:
        module = _random(config, dtype, device) if module is None else module.to(device)
        module = module.eval().requires_grad_(False)
        if load_format == "auto" and device == "cpu":
            own_memory(module)
    except (RuntimeError, AssertionError) as error:  # torch asserts where it was built without the device
        raise ConfigError(
            f"engine.device {device!r} cannot be used: {error}", field="engine.device"
        ) from None
    # Behind all copying: of what is computed with, whatever becomes of the files.
    revision = revision_of(config, module)
    eos_token_ids = eos_of(directory, raw, tells=device != "meta")
    spec = _spec(directory, config, dtype, eos_token_ids, revision, rope_of(raw))
    if spec.state is not None:
        install(module, spec.state, STEP)
    return LoadedModel(spec, module)


def _spec(
    directory: Path, config: Any, dtype: str, eos_token_ids: frozenset[int], revision: str, rope: str
) -> ModelSpec:
    num_heads, state = config.num_attention_heads, state_of(config, dtype)
    return ModelSpec(
        name=directory.resolve().name,
        num_layers=config.num_hidden_layers if state is None else len(state.kv_layers),
        num_heads=num_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // num_heads,
        vocab_size=config.vocab_size,
        max_model_len=config.max_position_embeddings,
        eos_token_ids=eos_token_ids,
        dtype=dtype,
        sliding_windows=_sliding_windows(config),
        revision=revision,
        rope=rope,
        state=state,
    )


def _sliding_windows(config: Any) -> frozenset[int | None]:
    window = None
    if getattr(config, "use_sliding_window", True):  # Qwen's switch
        window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if window is None or not kinds:
        return frozenset({window})
    return frozenset(window if kind == "sliding_attention" else None for kind in kinds)


def _check_supported(directory: Path, config: Any) -> None:
    """What config.json leaves open and transformers has filled in."""
    rope = getattr(config, "rope_parameters", None)
    kinds, stateful = getattr(config, "layer_types", None), HYBRID.get(config.model_type, "")
    if why := foreign_layers(kinds, stateful) or foreign_rope(rope):
        raise _refusal(directory, why)
    if stateful and set(kinds or ()) == {stateful}:
        raise _refusal(directory, "none of its layers keeps KV")
    for name in ("attn_logit_softcapping", "attention_chunk_size"):
        if getattr(config, name, None) is not None:
            raise _refusal(directory, f"{name} {getattr(config, name)!r} is not supported")
    if config.num_attention_heads % config.num_key_value_heads:
        raise _refusal(
            directory,
            f"{config.num_attention_heads} heads are no multiple of {config.num_key_value_heads} KV heads",
        )


def _pretrained(directory: Path, dtype: str) -> Any:
    for file in directory.glob("*.safetensors"):  # which it would call "no such file"
        if not os.access(file, os.R_OK):
            raise _refusal(directory, f"{file.name} cannot be read by this user")
    try:
        module, report = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=DTYPES[dtype],
            attn_implementation=ATTENTION,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, RuntimeError, SafetensorError) as error:  # no weights; of other shapes; damaged
        raise _refusal(directory, str(error)) from error
    # transformers only warns, and fills what is missing with random numbers.
    missing = sorted(report["missing_keys"])
    if missing:
        raise _refusal(directory, f"weights are missing: {', '.join(missing[:5])} ({len(missing)} in all)")
    extra = sorted(key for key in report["unexpected_keys"] if not key.endswith(_HARMLESS_SUFFIXES))
    if extra:
        raise _refusal(directory, f"weights are unknown: {', '.join(extra[:5])} ({len(extra)} in all)")
    return module


def _random(config: Any, dtype: str, device: str) -> Any:
    """Made where they stay: a model of 16 GB takes seconds on a GPU, and minutes by way of the host."""
    place = torch.device(device)
    if device == "meta":
        return sketch_of(config, dtype)
    torch.empty(0, device=place)  # of a device that is not there it says so, unlike its generators
    generators = [place] if place.type == "cuda" else []
    with torch.random.fork_rng(devices=generators), place:
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype], attn_implementation=ATTENTION)


def sketch_of(config: Any, dtype: str) -> Any:
    """A model without memory: parameters have shapes and no content. Drawing lots for content that there is
    none of would take a second, most of it for torch's compiler."""
    with no_init_weights(), torch.device("meta"):
        module = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype], attn_implementation=ATTENTION)
    module.tie_weights()  # which is a part of the initialisation that was left out
    return module


def _refusal(directory: Path, reason: str) -> ConfigError:
    return ConfigError(f"model {directory} cannot be served: {reason}", field="model.path")


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention of one layer, right after RoPE, for a packed batch.

    query: [1, num_heads, T, head_dim]; key, value: [1, num_kv_heads, T, head_dim]. Returns
    [1, T, num_heads, head_dim] (and no weights). Causality comes from the plan, so there is no mask.
    """
    step: AttentionStep | None = kwargs.get(STEP)
    if step is None:
        raise InternalError(f"a model of the engine was called without {STEP}")
    for name in _NOT_COMPUTED:
        if kwargs.get(name) is not None:
            raise InternalError(f"a model asks its attention for {name}, which is not computed")
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    kv = step.layers[layer]
    step.attention.write(kv, key[0].transpose(0, 1), value[0].transpose(0, 1))
    if step.on_layer is not None:
        step.on_layer(layer)
    out = step.attention.attend(query[0].transpose(0, 1), kv, scale=scaling, sliding_window=sliding_window)
    return out.unsqueeze(0), None


# Not among the mask functions too: for an attention that it has no mask for, transformers makes none. For
# others it looks for packed sequences in the positions, and waits for the device's answer in every step.
AttentionInterface.register(ATTENTION, _attention)
