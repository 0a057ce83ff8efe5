"""What differs between versions of vLLM, and what we use of it.

``USES`` is all of vLLM that this room touches: what is not there is not used, and a test holds each name, its
parameters and the order of the calls against every version of ``HELD``
(tests/services/engine/vllm/test_contract.py; tooling/vllm_contract.py reads them out of a wheel). Between
0.32 and 0.33 none of it differs. The next version that does gets its case here, and nowhere else.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Final

from microserve.protocol.errors import ConfigError

HELD: Final = ("0.32", "0.33")
"""Minor versions whose signatures and order of calls are as we need them. 0.32 is run, on CPUs."""

USES: Final[dict[str, dict[str, tuple[str, ...]]]] = {
    "distributed/kv_transfer/kv_connector/v1/base.py": {
        "KVConnectorBase_V1": ("__init__", "bind_connector_metadata", "bind_kv_cache_manager", "role"),
        "KVConnectorMetadata": (),
        "KVConnectorRole": ("SCHEDULER", "WORKER"),
        "SupportsHMA": ("request_finished_all_groups",),
    },
    "engine/arg_utils.py": {
        "AsyncEngineArgs": (),
        "EngineArgs": (
            *("block_size", "disable_log_stats", "dtype", "enable_lora", "enable_prefix_caching"),
            *("max_cpu_loras", "max_lora_rank", "max_loras"),
            *("enforce_eager", "kv_cache_memory_bytes", "kv_events_config", "kv_transfer_config"),
            *("load_format", "max_model_len", "max_num_batched_tokens", "max_num_seqs", "model"),
            *("num_gpu_blocks_override", "scheduling_policy", "served_model_name", "tokenizer"),
            "create_engine_config",
        ),
    },
    "config/scheduler.py": {"SchedulerConfig": ("long_prefill_token_threshold", "max_num_batched_tokens")},
    "config/kv_transfer.py": {
        "KVTransferConfig": (
            *("kv_connector", "kv_connector_module_path", "kv_connector_extra_config", "kv_role"),
        ),
    },
    "config/kv_events.py": {
        "KVEventsConfig": ("enable_kv_cache_events", "endpoint", "publisher", "replay_endpoint"),
    },
    "v1/engine/async_llm.py": {
        "AsyncLLM": (
            *("abort", "add_lora", "add_request", "check_health", "from_vllm_config", "generate", "shutdown"),
        ),
    },
    "lora/request.py": {"LoRARequest": ("lora_int_id", "lora_name", "lora_path")},
    "sampling_params.py": {
        "SamplingParams": (
            *(
                "allowed_token_ids",
                "bad_words",
                "detokenize",
                "extra_args",
                "frequency_penalty",
                "ignore_eos",
            ),
            *("logit_bias", "logprobs", "max_tokens", "min_p", "min_tokens", "output_kind"),
            *("presence_penalty", "prompt_logprobs", "repetition_penalty", "seed", "stop_token_ids"),
            *("structured_outputs", "temperature", "top_k", "top_p"),
        ),
        "StructuredOutputsParams": ("grammar", "json", "regex", "structural_tag"),
        "RequestOutputKind": ("DELTA",),
    },
    "outputs.py": {
        "RequestOutput": ("finished", "num_cached_tokens", "outputs", "prompt_logprobs"),
        "CompletionOutput": ("finish_reason", "logprobs", "stop_reason", "token_ids"),
    },
    "v1/outputs.py": {
        "KVConnectorOutput": ("finished_recving", "finished_sending", "invalid_block_ids"),
    },
    "v1/core/sched/output.py": {
        "SchedulerOutput": ("num_scheduled_tokens", "finished_req_ids", "kv_connector_metadata"),
    },
    "v1/core/kv_cache_manager.py": {
        "KVCacheBlocks": ("get_block_ids",),
        "KVCacheManager": ("evict_blocks", "get_block_ids"),
    },
    "v1/kv_cache_interface.py": {
        "KVCacheConfig": ("kv_cache_groups", "kv_cache_layout", "kv_cache_tensors", "num_blocks"),
        "KVCacheTensor": ("block_stride", "layer_stride", "layers", "offset", "size"),
        "KVCacheGroupSpec": ("kv_cache_spec",),
    },
    "distributed/kv_events.py": {
        "BlockStored": (
            "block_hashes",
            "block_size",
            "lora_id",
            "lora_name",
            "medium",
            "parent_block_hash",
            "token_ids",
        ),
        "BlockRemoved": ("block_hashes", "medium"),
        "AllBlocksCleared": (),
    },
    "entrypoints/scale_out/token_in_token_out/protocol.py": {
        "GenerateRequest": (
            *("cache_salt", "model", "priority", "request_id", "sampling_params", "stream", "token_ids"),
        ),
        "GenerateTokensStreamChoice": ("logprobs",),
        "GenerateStreamChoiceBase": ("finish_reason", "index", "stop_reason", "token_ids"),
        "GenerateLogProbsContent": ("top_logprobs",),
        "GenerateLogProb": ("logprob", "token_id"),
    },
}
"""Names of each class, by the file under ``vllm/``. The connector's hooks are read from it, not listed."""

ORDERS: Final[dict[str, tuple[str, ...]]] = {
    "v1/core/sched/scheduler.py:Scheduler.schedule": (
        "get_num_new_matched_tokens",
        "allocate_slots",
        "update_state_after_alloc",
        "_build_kv_connector_meta",
    ),
    "v1/core/sched/scheduler.py:Scheduler._update_from_kv_xfer_finished": ("update_connector_output",),
    "v1/core/sched/scheduler.py:Scheduler.update_from_output": (
        "_handle_invalid_blocks",
        "finish_requests",
        "_update_from_kv_xfer_finished",
        "take_events",
        "publish",
    ),
    "v1/worker/kv_connector_model_runner_mixin.py:KVConnectorModelRunnerMixin._get_kv_connector_output": (
        "bind_connector_metadata",
        "wait_for_save",
        "get_transfer_results",
        "get_block_ids_with_load_errors",
        "clear_connector_metadata",
    ),
    "model_executor/layers/attention/kv_transfer_utils.py:maybe_transfer_kv_layer": (
        "wait_for_layer_load",
        "func",
        "save_kv_layer",
    ),
    "v1/worker/gpu_worker.py:Worker.initialize_from_config": (
        "ensure_kv_transfer_initialized",
        "get_mem_pool_context",
        "initialize_kv_cache",
    ),
}
"""Calls that come in this order, others between them, by function. Of a call that comes more than once: its
last place."""


def installed() -> str:
    """Raises :class:`ConfigError` if vLLM is not installed here, or in a version that nothing holds."""
    try:
        found = version("vllm")
    except PackageNotFoundError:
        raise ConfigError("vLLM is not installed in this environment", field="vllm.python") from None
    minor = ".".join(found.split(".")[:2])
    if minor not in HELD:
        raise ConfigError(
            f"vLLM {found} is installed, and this MicroServe knows {' and '.join(HELD)}", field="vllm.python"
        )
    return found
