"""What a vLLM must be set to for its KV cache to be our heap; anything else is refused at the start.

Owns the refusals, each with the setting to change, and the layout that follows from vLLM's own. vLLM's
objects come as they are: this file imports nothing of it.
"""

from __future__ import annotations

from typing import Any, Final

from microserve.kvcache.layout import KvLayout
from microserve.protocol.errors import ConfigError
from microserve.services.engine.vllm.link_ends import LinkAddress

PHYSICAL_LAYOUT: Final = "LBHNC"
"""Layers, then blocks: a block of one layer is one run of bytes."""
PARALLEL: Final = (
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "data_parallel_size",
    "prefill_context_parallel_size",
    "decode_context_parallel_size",
)
"""Each more than 1 is more than one worker."""


def require_supported(vllm_config: Any, kv_cache_config: Any) -> None:
    """:class:`ConfigError` names the first setting that we cannot serve, and what would do."""
    parallel = vllm_config.parallel_config
    for field in PARALLEL:
        size = getattr(parallel, field)
        _require(size == 1, field, f"is {size}: KV of one rank only is sent and received, so 1")
    device = vllm_config.device_config.device_type
    _require(
        device == "cpu",
        "device",
        f"is {device!r}: a device's KV cache needs puts in its streams' order, so 'cpu'",
    )
    is_async = vllm_config.scheduler_config.async_scheduling
    _require(not is_async, "async_scheduling", "is on: what a step lacks is told before the next one, so off")
    speculative = vllm_config.speculative_config
    _require(speculative is None, "speculative_config", "is set: a draft's KV is not sent, so none")
    caching = vllm_config.cache_config.enable_prefix_caching
    _require(bool(caching), "enable_prefix_caching", "is off: what is received is found by it, so on")
    role = vllm_config.kv_transfer_config.kv_role
    _require(role == "kv_both", "kv_role", f"is {role!r}: an engine sends and receives, so 'kv_both'")

    groups = kv_cache_config.kv_cache_groups
    names = [type(group.kv_cache_spec).__name__ for group in groups]
    _require(
        names == ["FullAttentionSpec"],
        "model",
        f"has KV cache groups {names}: one of full attention is sent and received (no windows, no state "
        "of other kinds)",
    )
    spec = groups[0].kv_cache_spec
    for field in ("sliding_window", "attention_chunk_size"):
        bound = getattr(spec, field, None)
        _require(bound is None, field, f"is {bound}: attention within bounds only is not sent")
    physical = kv_cache_config.kv_cache_layout
    _require(
        physical == PHYSICAL_LAYOUT, "kv_cache_layout", f"is {physical!r}: only {PHYSICAL_LAYOUT!r} is sent"
    )


def layout_of(kv_cache_config: Any, address: LinkAddress, order: str) -> KvLayout:
    """The heap that vLLM's KV cache is. :class:`ConfigError` where its bytes are not as we count them: a
    quantised cache with its scales, say."""
    spec = kv_cache_config.kv_cache_groups[0].kv_cache_spec
    tensors = kv_cache_config.kv_cache_tensors
    layout = KvLayout(
        model=address.model,
        num_layers=sum(len(tensor.layers) for tensor in tensors),
        num_blocks=kv_cache_config.num_blocks,
        block_size=spec.block_size,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_size,
        dtype=str(spec.dtype).removeprefix("torch."),
        revision=address.revision,
        order=order,
    )
    expected = (1, 0, layout.data_nbytes, layout.layer_nbytes, layout.block_nbytes)
    first = tensors[0]
    found = (len(tensors), first.offset, first.size, first.layer_stride, first.block_stride)
    _require(
        found == expected,
        "kv_cache_dtype",
        f"gives tensors, offset, bytes, layer stride, block stride of {found}, not {expected}",
    )
    return layout


def layer_names(kv_cache_config: Any) -> list[str]:
    """In the order in which the layers lie in memory."""
    return list(kv_cache_config.kv_cache_tensors[0].layers)


def _require(is_so: bool, field: str, detail: str) -> None:
    if not is_so:
        raise ConfigError(f"vLLM's {field} {detail}", field=field)
