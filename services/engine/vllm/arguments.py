"""From our settings to vLLM's engine arguments.

    settings -> arguments_of (names and numbers, pure) -> config_of (vLLM's own check) -> VllmConfig

Owns which setting is which argument, and that a wrong one is a :class:`ConfigError` with the name of the
setting. ``vllm.arguments`` are passed on as they are; those that have a setting of their own are refused
before (protocol/settings/vllm.py).
"""

from __future__ import annotations

import dataclasses
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from microserve.protocol.errors import ConfigError
from microserve.protocol.settings.settings import Settings
from microserve.services.engine.room import HOST_SHARE, MAX_HOST_POOL_NBYTES, Room, unpromised_room

if TYPE_CHECKING:
    from vllm.config import VllmConfig

CPU_BLOCK = 32
"""Tokens of which a block is a multiple where vLLM computes on a CPU."""
LONG_PREFILL_SHARE = 0.75
"""Of a step's tokens, how many one prompt may take: the rest is left for requests that wait, among them those
that ask for blocks to receive into. vLLM looks at none of them while one prompt fills its steps."""
MIN_KV_NBYTES = 16 << 20


def arguments_of(settings: Settings, room: Room | None) -> dict[str, Any]:
    """Of ``AsyncEngineArgs``, by name. ``room``: what is left of this machine's memory, for a KV cache whose
    size nobody says. Raises :class:`ConfigError`."""
    engine, cache, vllm, model = settings.engine, settings.kvcache, settings.vllm, settings.model
    on_cpu = engine.device == "cpu"
    if on_cpu and cache.block_size % CPU_BLOCK:
        raise ConfigError(
            f"kvcache.block_size must be a multiple of {CPU_BLOCK} for engine.backend 'vllm' on a CPU, is "
            f"{cache.block_size}",
            field="kvcache.block_size",
        )
    arguments: dict[str, Any] = {
        "scheduling_policy": "priority",
        **vllm.arguments,
        "model": model.path,
        "tokenizer": model.path,
        "served_model_name": model.name or None,
        "dtype": model.dtype,
        "load_format": "dummy" if model.load_format == "random" else "auto",
        "block_size": cache.block_size,
        "enable_prefix_caching": True,
        "enforce_eager": vllm.enforce_eager,
        "max_num_seqs": engine.max_num_seqs,
        "max_num_batched_tokens": max(engine.max_num_batched_tokens, engine.max_num_seqs),
        "num_gpu_blocks_override": cache.num_blocks or None,
        "disable_log_stats": vllm.arguments.get("disable_log_stats", True),
    }
    if engine.max_model_len:
        arguments["max_model_len"] = engine.max_model_len
    if vllm.kv_cache_mb:
        arguments["kv_cache_memory_bytes"] = vllm.kv_cache_mb << 20
    elif on_cpu and room is not None:
        share = int((room.nbytes - room.margin_nbytes) * HOST_SHARE / settings.mesh.engines)
        arguments["kv_cache_memory_bytes"] = max(MIN_KV_NBYTES, min(share, MAX_HOST_POOL_NBYTES))
    return arguments


def config_of(settings: Settings, **ours: Any) -> VllmConfig:
    """What ``AsyncLLM.from_vllm_config`` is given; ``ours``: arguments that no setting has, as
    ``kv_transfer_config``. Raises :class:`ConfigError`: what vLLM says of an argument that it refuses."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    room = unpromised_room() if settings.engine.device == "cpu" else None
    arguments = {**arguments_of(settings, room), **ours}
    require_known(arguments, {field.name for field in dataclasses.fields(AsyncEngineArgs)})
    try:
        config = AsyncEngineArgs(**arguments).create_engine_config()
    except (ValueError, TypeError, NotImplementedError, OSError) as error:  # pydantic's is a ValueError
        raise ConfigError(f"vLLM refuses these settings: {_said(error)}", field="vllm.arguments") from error
    scheduler = config.scheduler_config
    if "long_prefill_token_threshold" not in settings.vllm.arguments:
        limit = int(scheduler.max_num_batched_tokens * LONG_PREFILL_SHARE)
        scheduler.long_prefill_token_threshold = min(limit, config.model_config.max_model_len)
    return config


def _said(error: Exception) -> str:
    """In a line; pydantic shows all that it was given as well."""
    errors = getattr(error, "errors", None)
    text = "; ".join(each["msg"] for each in errors()) if callable(errors) else str(error)
    return " ".join(text.replace("Value error, ", "").split())


def require_known(arguments: dict[str, Any], known: set[str]) -> None:
    """Raises :class:`ConfigError` for a name that this vLLM does not know."""
    for name in arguments:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            meant = f", did you mean {near[0]}?" if near else ""
            raise ConfigError(
                f"vllm.arguments.{name} is no engine argument of the installed vLLM{meant}",
                field=f"vllm.arguments.{name}",
            )
