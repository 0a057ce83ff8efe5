"""Which layers of a model keep a state, what it is, and where it lies beside KV.

The pool has a layer for each layer of the model that keeps KV. A layer with a state belongs to the next
such one, or to the last; there its tensors lie one behind the other in the bytes of the request's state
blocks:

    model   conv 0 | conv 1 | attention 2 | conv 3 | attention 4 | conv 5
    pool    layer 0: K, V of 2; state 0, 1      layer 1: K, V of 4; state 3, 5

So a layer of the pool is whole, state included, when the model has computed the last of those that belong
to it. Knows configs, no tensors.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import Any

from microserve.services.engine.model.directory.families import HYBRID
from microserve.services.engine.model.spec import StateLayer, StateSpec, StateTensor

_MIXERS = {"conv": "conv", "linear_attention": "linear_attn"}
_ALIGNMENT_NBYTES = 16


def state_of(config: Any, dtype: str) -> StateSpec | None:
    """``config``: transformers', of a model that is served; None where all layers keep KV. ``dtype``: of what
    its layers compute in. One whose layers all keep a state has no ``kv_layers``."""
    kind = HYBRID.get(config.model_type)
    if kind is None or kind not in config.layer_types:
        return None
    shapes = _conv(config, dtype) if kind == "conv" else _delta_net(config, dtype)
    kv_layers = tuple(layer for layer, each in enumerate(config.layer_types) if each != kind)
    ends = [0] * len(kv_layers)
    layers = []
    for layer, each in enumerate(config.layer_types):
        if each != kind or not kv_layers:
            continue
        kv_layer = min(bisect_left(kv_layers, layer), len(kv_layers) - 1)
        tensors = []
        for shape, its_dtype in shapes:
            tensor = StateTensor(ends[kv_layer], shape, its_dtype)
            ends[kv_layer] += -(-tensor.nbytes // _ALIGNMENT_NBYTES) * _ALIGNMENT_NBYTES
            tensors.append(tensor)
        layers.append(StateLayer(layer, kv_layer, tuple(tensors)))
    return StateSpec(_MIXERS[kind], tuple(layers), kv_layers, max(ends, default=0))


def _conv(config: Any, dtype: str) -> list[tuple[tuple[int, ...], str]]:
    return [((config.hidden_size, config.conv_L_cache), dtype)]


def _delta_net(config: Any, dtype: str) -> list[tuple[tuple[int, ...], str]]:
    key_dim, value_dim = config.linear_key_head_dim, config.linear_value_head_dim
    channels = 2 * config.linear_num_key_heads * key_dim + config.linear_num_value_heads * value_dim
    return [
        ((channels, config.linear_conv_kernel_dim), dtype),
        ((config.linear_num_value_heads, key_dim, value_dim), "float32"),
    ]
