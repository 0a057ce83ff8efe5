"""Families of a gateway; of several workers each sample has ``worker`` as well."""

from __future__ import annotations

from microserve.protocol.metrics.bounds import (
    CHOICES_BOUNDS,
    INTER_TOKEN_BOUNDS,
    LATENCY_BOUNDS,
    LENGTH_BOUNDS,
    PHASE_BOUNDS,
    TTFT_BOUNDS,
)
from microserve.protocol.metrics.family import counter, gauge, histogram
from microserve.protocol.metrics.table.strategies import strategy_families

BY_STRATEGY = strategy_families("microserve_strategy")
_MODEL = "model_name"

TTFT = histogram(
    "microserve_time_to_first_token_seconds",
    "HTTP arrival to first token.",
    _MODEL,
    bounds=TTFT_BOUNDS,
    vllm="time_to_first_token_seconds",
)
INTER_TOKEN = histogram(
    "microserve_inter_token_latency_seconds",
    "Between tokens; merged tokens count once.",
    _MODEL,
    bounds=INTER_TOKEN_BOUNDS,
    vllm="inter_token_latency_seconds",
)
TPOT = histogram(
    "microserve_request_time_per_output_token_seconds",
    "Mean of a choice's tokens after the first.",
    _MODEL,
    bounds=INTER_TOKEN_BOUNDS,
    vllm=("request_time_per_output_token_seconds", "time_per_output_token_seconds"),
)
E2E = histogram(
    "microserve_e2e_request_latency_seconds",
    "HTTP arrival to last byte.",
    _MODEL,
    bounds=LATENCY_BOUNDS,
    vllm="e2e_request_latency_seconds",
)
QUEUE_TIME = histogram(
    "microserve_request_queue_time_seconds",
    "Of a choice, until engines worked for it: routed, granted, admitted.",
    _MODEL,
    bounds=PHASE_BOUNDS,
    vllm="request_queue_time_seconds",
)
PREFILL_TIME = histogram(
    "microserve_request_prefill_time_seconds",
    "Of a choice: prefilled, transferred, first token.",
    _MODEL,
    bounds=PHASE_BOUNDS,
    vllm="request_prefill_time_seconds",
)
DECODE_TIME = histogram(
    "microserve_request_decode_time_seconds",
    "Of a choice, from its first token to its last.",
    _MODEL,
    bounds=PHASE_BOUNDS,
    vllm="request_decode_time_seconds",
)
INFERENCE_TIME = histogram(
    "microserve_request_inference_time_seconds",
    "Of a choice: prefill and decode.",
    _MODEL,
    bounds=PHASE_BOUNDS,
    vllm="request_inference_time_seconds",
)
PROMPT_LENGTH = histogram(
    "microserve_request_prompt_tokens",
    "Of a choice's prompt.",
    _MODEL,
    bounds=LENGTH_BOUNDS,
    unit="tokens",
    vllm="request_prompt_tokens",
)
OUTPUT_LENGTH = histogram(
    "microserve_request_generation_tokens",
    "Of a choice's output.",
    _MODEL,
    bounds=LENGTH_BOUNDS,
    unit="tokens",
    vllm="request_generation_tokens",
)
MAX_TOKENS = histogram(
    "microserve_request_params_max_tokens",
    "Most output tokens of a choice.",
    _MODEL,
    bounds=LENGTH_BOUNDS,
    unit="tokens",
    vllm=("request_params_max_tokens", "request_max_num_generation_tokens"),
)
N = histogram(
    "microserve_request_params_n",
    "Choices of a prompt.",
    _MODEL,
    bounds=CHOICES_BOUNDS,
    unit="choices",
    vllm="request_params_n",
)

PROMPT_TOKENS = counter(
    "microserve_prompt_tokens",
    "Prompt tokens of admitted requests.",
    _MODEL,
    unit="tokens",
    vllm="prompt_tokens",
)
PROMPT_SOURCES = counter(
    "microserve_prompt_tokens_by_source",
    "Of choices that have ended: computed (`local_compute`), in the engine's cache (`local_cache_hit`), or "
    "sent there (`external_kv_transfer`).",
    _MODEL,
    "source",
    unit="tokens",
    vllm="prompt_tokens_by_source",
)
PREFIX_QUERIES = counter(
    "microserve_prefix_queries_tokens",
    "Prompt tokens of choices that have ended.",
    _MODEL,
    unit="tokens",
    vllm=("prefix_cache_queries", "gpu_prefix_cache_queries"),
)
PREFIX_HITS = counter(
    "microserve_prefix_hits_tokens",
    "Of these, tokens that their engine's cache had.",
    _MODEL,
    unit="tokens",
    vllm=("prefix_cache_hits", "gpu_prefix_cache_hits"),
)
GENERATED = counter(
    "microserve_generation_tokens", "Tokens received.", _MODEL, unit="tokens", vllm="generation_tokens"
)
PREEMPTIONS = counter(
    "microserve_preemptions", "Of choices that have ended, at their engines.", _MODEL, vllm="num_preemptions"
)
FINISHED = counter(
    "microserve_request_success",
    "Sequences by how they ended: `stop`, `length`, `abort`, `error`.",
    _MODEL,
    "finished_reason",
    vllm="request_success",
)
RESPONSES = counter("microserve_http_responses", "HTTP answers of the API.", "status", "code")
DISCONNECTS = counter(
    "microserve_disconnects", "Clients that went early, by phase: `queued`, `prefill`, `decode`.", "phase"
)
CALLS = counter(
    "microserve_tool_calls", "Calls of tools in answers: `read`, or left as text (`unread`).", "outcome"
)

CHOICES = gauge("microserve_requests_running", "Sequences in flight here.", _MODEL)
ENGINES_RUNNING = gauge(
    "microserve_mesh_requests_running",
    "Sequences in the batches of all engines.",
    _MODEL,
    vllm="num_requests_running",
)
ENGINES_WAITING = gauge(
    "microserve_mesh_requests_waiting",
    "Requests that wait at engines.",
    _MODEL,
    vllm="num_requests_waiting",
)
USAGE = gauge(
    "microserve_mesh_kv_cache_usage_ratio",
    "Blocks of all engines in use, 0 to 1.",
    _MODEL,
    unit="ratio",
    vllm=("kv_cache_usage_perc", "gpu_cache_usage_perc"),
)
MAILBOX_TOKENS = gauge("microserve_mailbox_tokens", "Tokens without a reader.", unit="tokens")
ROUTERS_ALIVE = gauge("microserve_routers_alive", "Routers that answer.")

KEY_COUNTS = {
    "requests": counter("microserve_key_requests", "Requests of an API key that were let in.", "key"),
    "refused": counter("microserve_key_refused", "Requests beyond a limit of their API key.", "key"),
    "prompt_tokens": counter("microserve_key_prompt_tokens", "Prompt tokens of an API key.", "key"),
    "cached_tokens": counter("microserve_key_cached_tokens", "Those of them that its cache had.", "key"),
    "output_tokens": counter("microserve_key_output_tokens", "Output tokens of an API key.", "key"),
}
"""By field of ``Counts``. Named keys only: everybody's use is in the other families."""
KEY_STREAMS = gauge("microserve_key_streams", "Streams of an API key.", "key")

GATEWAY = (
    *(TTFT, INTER_TOKEN, TPOT, E2E, QUEUE_TIME, PREFILL_TIME, DECODE_TIME, INFERENCE_TIME),
    *(
        PROMPT_LENGTH,
        OUTPUT_LENGTH,
        MAX_TOKENS,
        N,
        PROMPT_TOKENS,
        PROMPT_SOURCES,
        PREFIX_QUERIES,
        PREFIX_HITS,
    ),
    *(GENERATED, PREEMPTIONS, FINISHED, RESPONSES, DISCONNECTS, CALLS, CHOICES, ENGINES_RUNNING),
    *(ENGINES_WAITING, USAGE, MAILBOX_TOKENS, ROUTERS_ALIVE, *KEY_COUNTS.values(), KEY_STREAMS),
    *BY_STRATEGY.all,
)
