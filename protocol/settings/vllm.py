"""Settings of engines that are vLLM's: every field with its default, its bounds and its sentence.

What vLLM's arguments are called is vLLM's, and asked where it is installed (services/engine/vllm).
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from microserve.protocol.errors import ConfigError
from microserve.protocol.settings.bounds import CountOrZero, Section

OURS = {
    "block_size": "kvcache.block_size",
    "dtype": "model.dtype",
    "enable_lora": "model.adapters",
    "enable_prefix_caching": "",
    "enforce_eager": "vllm.enforce_eager",
    "kv_cache_memory_bytes": "vllm.kv_cache_mb",
    "kv_events_config": "",
    "kv_transfer_config": "",
    "load_format": "model.load_format",
    "max_cpu_loras": "model.adapters",
    "max_lora_rank": "model.adapters",
    "max_model_len": "engine.max_model_len",
    "max_num_batched_tokens": "engine.max_num_batched_tokens",
    "max_num_seqs": "engine.max_num_seqs",
    "model": "model.path",
    "num_gpu_blocks_override": "kvcache.num_blocks",
    "served_model_name": "model.name",
    "skip_tokenizer_init": "",
    "tokenizer": "model.path",
}
"""Arguments of vLLM's that are settings here, by which; empty: what MicroServe needs, and no setting."""

_URL = re.compile(r"https?://(\[[^]\s]+\]|[^][:/?#\s]+)(:\d{1,5})?(/[^?#\s]*)?")


class VllmSettings(Section, frozen=True):
    python: str = ""
    """Of the environment that has vLLM and MicroServe; empty: the one that starts the engine."""
    kv_cache_mb: CountOrZero = 0
    """Memory of vLLM's KV cache. 0: this engine's part (``mesh.engines``) of a quarter of this machine's."""
    enforce_eager: bool = False
    """Nothing is compiled: the start takes seconds instead of a minute, and steps are slower."""
    early_start: bool = False
    """Begin on the rest of a prompt while the last layers before it still arrive: an earlier first token, for
    which whoever is in the same batch waits along."""
    arguments: dict[str, Any] = msgspec.field(default_factory=dict)
    """More of vLLM's engine arguments by their names in Python, e.g. ``{tensor_parallel_size = 2}``."""
    url: str = ""
    """Of the ``vllm serve`` for which an engine of ``vllm-serve`` stands: ``http://HOST:PORT``."""
    api_key: str = ""
    """That it asks for."""

    def check(self) -> None:
        """Raises :class:`ConfigError` naming the path."""
        for name in self.arguments:
            if (ours := OURS.get(name)) is not None:
                instead = f"is set by {ours}" if ours else "is MicroServe's own to set"
                path = f"vllm.arguments.{name}"
                raise ConfigError(f"{path} {instead}", field=path)
        if self.url and not _URL.fullmatch(self.url):
            raise ConfigError(f"vllm.url must be http://HOST:PORT, is {self.url!r}", field="vllm.url")
