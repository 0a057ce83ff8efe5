"""Families of an engine. All have ``model_name`` and ``engine``."""

from __future__ import annotations

from microserve.protocol.metrics.bounds import (
    CHOICES_BOUNDS,
    INTER_TOKEN_BOUNDS,
    LATENCY_BOUNDS,
    LENGTH_BOUNDS,
    NBYTES_BOUNDS,
    PHASE_BOUNDS,
    STEP_BOUNDS,
    STEP_TOKENS_BOUNDS,
    TRANSFER_BOUNDS,
    TTFT_BOUNDS,
)
from microserve.protocol.metrics.family import counter, gauge, histogram

# --- what is here now ------------------------------------------------------------------------------

RUNNING = gauge("microserve_engine_requests_running", "Sequences in the batch.", vllm="num_requests_running")
WAITING = gauge("microserve_engine_requests_waiting", "Sequences that wait.", vllm="num_requests_waiting")
WAITING_FOR = gauge(
    "microserve_engine_requests_waiting_by_reason",
    "Those for their turn (`capacity`), for KV on its way (`kv`), for their grammar (`grammar`).",
    "reason",
    vllm="num_requests_waiting_by_reason",
)
OLDEST_WAIT = gauge(
    "microserve_engine_oldest_wait_seconds",
    "Since the oldest that waits has come; 0: none does.",
    unit="seconds",
)
QUEUED_TOKENS = gauge(
    "microserve_engine_queued_prefill_tokens", "Prompt tokens here that are not computed yet.", unit="tokens"
)
BLOCKS = gauge(
    "microserve_engine_kv_blocks",
    "Blocks of the pool: `free` and empty, free and `cached`, `granted` to writers, `quarantined`, `used`.",
    "state",
    unit="blocks",
)
USAGE = gauge(
    "microserve_engine_kv_cache_usage_ratio",
    "Share of blocks that are neither free nor cached, 0 to 1.",
    unit="ratio",
    vllm=("kv_cache_usage_perc", "gpu_cache_usage_perc"),
)
GRANTS = gauge("microserve_engine_grants", "Grants by state: `open`, `sealed`, `quarantined`.", "state")
OLDEST_LEASE = gauge(
    "microserve_engine_oldest_lease_seconds", "Since the oldest open grant was given.", unit="seconds"
)
OLDEST_QUARANTINE = gauge(
    "microserve_engine_oldest_quarantine_seconds", "Since the oldest quarantine began.", unit="seconds"
)
DRAINING = gauge("microserve_engine_draining", "1 while it takes no new work.")
ROUTERS = gauge("microserve_engine_peers", "Routers, and the index, that are connected.")
TIME_SHARE = gauge(
    "microserve_engine_time_share_ratio",
    "Of its time in the last seconds, what went to `prefill` (with decodes of the same steps), to `decode` "
    "alone, to waiting for KV on its way (`transfer`), and to nothing (`idle`).",
    "activity",
    unit="ratio",
)
PREFILL_RATE = gauge(
    "microserve_engine_prefill_tokens_per_second",
    "As it was measured last, of full steps.",
    unit="tokens/second",
)
DECODE_STEP = gauge(
    "microserve_engine_decode_step_seconds", "Of a step without prefill, smoothed.", unit="seconds"
)
CACHE_CONFIG = gauge(
    "microserve_engine_cache_config_info",
    "1; the pool's sizes.",
    "block_size",
    "num_gpu_blocks",
    "enable_prefix_caching",
    vllm="cache_config_info",
)
LORA = gauge(
    "microserve_engine_lora_requests_info",
    "Seconds since 1970; adapters with requests that run and that wait, and how many fit.",
    "max_lora",
    "running_lora_adapters",
    "waiting_lora_adapters",
    vllm="lora_requests_info",
)
INFO = gauge(
    "microserve_engine_info",
    "1; what computes here, in which numerics class, and who reaches its KV.",
    "version",
    "backend",
    "backend_version",
    "numerics",
    "exact",
    "heaps",
)

# --- tokens ----------------------------------------------------------------------------------------

PREFIX_QUERIES = counter(
    "microserve_engine_prefix_queries_tokens",
    "Tokens that the prefix cache was asked for.",
    unit="tokens",
    vllm=("prefix_cache_queries", "gpu_prefix_cache_queries"),
)
PREFIX_HITS = counter(
    "microserve_engine_prefix_hits_tokens",
    "Of these, tokens it had.",
    unit="tokens",
    vllm=("prefix_cache_hits", "gpu_prefix_cache_hits"),
)
PROMPT_TOKENS = counter(
    "microserve_engine_prompt_tokens", "Of generations that have begun.", unit="tokens", vllm="prompt_tokens"
)
PROMPT_SOURCES = counter(
    "microserve_engine_prompt_tokens_by_source",
    "Those that were computed here (`local_compute`), cached here (`local_cache_hit`), or sent here "
    "(`external_kv_transfer`).",
    "source",
    unit="tokens",
    vllm="prompt_tokens_by_source",
)
PROMPT_CACHED = counter(
    "microserve_engine_prompt_tokens_cached",
    "Those that were not computed here.",
    unit="tokens",
    vllm="prompt_tokens_cached",
)
GENERATED = counter(
    "microserve_engine_generation_tokens", "Output tokens.", unit="tokens", vllm="generation_tokens"
)

# --- requests --------------------------------------------------------------------------------------

FINISHED = counter(
    "microserve_engine_requests_finished",
    "Generations by how they ended: `stop`, `length`, `abort`, `error`.",
    "finished_reason",
    vllm="request_success",
)
PREEMPTIONS = counter(
    "microserve_engine_preemptions", "Sequences that gave their blocks back.", vllm="num_preemptions"
)
TTFT = histogram(
    "microserve_engine_time_to_first_token_seconds",
    "From its coming here to its first token.",
    bounds=TTFT_BOUNDS,
    vllm="time_to_first_token_seconds",
)
INTER_TOKEN = histogram(
    "microserve_engine_inter_token_latency_seconds",
    "Between two tokens of a sequence.",
    bounds=INTER_TOKEN_BOUNDS,
    vllm="inter_token_latency_seconds",
)
TPOT = histogram(
    "microserve_engine_request_time_per_output_token_seconds",
    "Mean of a generation's tokens after the first.",
    bounds=INTER_TOKEN_BOUNDS,
    vllm=("request_time_per_output_token_seconds", "time_per_output_token_seconds"),
)
E2E = histogram(
    "microserve_engine_e2e_request_latency_seconds",
    "From its coming here to its end.",
    bounds=LATENCY_BOUNDS,
    vllm="e2e_request_latency_seconds",
)
ARRIVAL_TIME = histogram(
    "microserve_engine_request_arrival_time_seconds", "Waited for KV from other engines.", bounds=PHASE_BOUNDS
)
QUEUE_TIME = histogram(
    "microserve_engine_request_queue_time_seconds",
    "Waited for its turn.",
    bounds=PHASE_BOUNDS,
    vllm="request_queue_time_seconds",
)
PREFILL_TIME = histogram(
    "microserve_engine_request_prefill_time_seconds",
    "From its first step to its first token.",
    bounds=PHASE_BOUNDS,
    vllm="request_prefill_time_seconds",
)
DECODE_TIME = histogram(
    "microserve_engine_request_decode_time_seconds",
    "From its first token to its end.",
    bounds=PHASE_BOUNDS,
    vllm="request_decode_time_seconds",
)
INFERENCE_TIME = histogram(
    "microserve_engine_request_inference_time_seconds",
    "From its first step to its end.",
    bounds=PHASE_BOUNDS,
    vllm="request_inference_time_seconds",
)
PROMPT_LENGTH = histogram(
    "microserve_engine_request_prompt_tokens",
    "Of a generation's prompt.",
    bounds=LENGTH_BOUNDS,
    unit="tokens",
    vllm="request_prompt_tokens",
)
OUTPUT_LENGTH = histogram(
    "microserve_engine_request_generation_tokens",
    "Of a generation's output.",
    bounds=LENGTH_BOUNDS,
    unit="tokens",
    vllm="request_generation_tokens",
)
COMPUTED_LENGTH = histogram(
    "microserve_engine_request_prefill_kv_computed_tokens",
    "Prompt tokens that a generation had to compute.",
    bounds=LENGTH_BOUNDS,
    unit="tokens",
    vllm="request_prefill_kv_computed_tokens",
)
MAX_TOKENS = histogram(
    "microserve_engine_request_params_max_tokens",
    "Most output tokens that were asked for.",
    bounds=LENGTH_BOUNDS,
    unit="tokens",
    vllm=("request_params_max_tokens", "request_max_num_generation_tokens"),
)
N = histogram(
    "microserve_engine_request_params_n",
    "Choices; 1 each, for here every choice is a request.",
    bounds=CHOICES_BOUNDS,
    unit="choices",
    vllm="request_params_n",
)
CUT_OFF = counter(
    "microserve_engine_requests_refused",
    "Work not taken or not done: `grant` (no blocks), `grammar`, `sequence` (its computation broke).",
    "reason",
)

# --- steps -----------------------------------------------------------------------------------------

STEP_TOKENS = histogram(
    "microserve_engine_step_tokens",
    "Tokens in a step.",
    bounds=STEP_TOKENS_BOUNDS,
    unit="tokens",
    vllm="iteration_tokens_total",
)
STEP_SECONDS = histogram(
    "microserve_engine_step_seconds",
    "Of a step: `prefill`, `decode`, both (`mixed`), or nothing but puts (`send`).",
    "kind",
    bounds=STEP_BOUNDS,
)
STEPS_FAILED = counter("microserve_engine_steps_failed", "Steps that raised.")
EARLY_STARTS = counter("microserve_engine_early_starts", "Steps that began before all of their KV was in.")

# --- transfers and grants --------------------------------------------------------------------------

SEND_SECONDS = histogram(
    "microserve_engine_send_seconds",
    "Putting the KV of one send, by kind of the receiver's heap.",
    "heap",
    bounds=TRANSFER_BOUNDS,
    vllm="nixl_xfer_time_seconds",
)
SEND_NBYTES = histogram(
    "microserve_engine_send_bytes",
    "Of one send, by kind of the receiver's heap.",
    "heap",
    bounds=NBYTES_BOUNDS,
    unit="bytes",
    vllm="nixl_bytes_transferred",
)
SENDS_FAILED = counter(
    "microserve_engine_sends_failed",
    "Sends that ended without all of their KV put, by error code.",
    "code",
    vllm="nixl_num_failed_transfers",
)
RECEIVE_SECONDS = histogram(
    "microserve_engine_receive_seconds",
    "From a grant to all of its KV, by kind of this engine's heap.",
    "heap",
    bounds=TRANSFER_BOUNDS,
)
RECEIVE_NBYTES = histogram(
    "microserve_engine_receive_bytes",
    "KV that came by one grant, by kind of this engine's heap.",
    "heap",
    bounds=NBYTES_BOUNDS,
    unit="bytes",
)
RECEIVES_FAILED = counter(
    "microserve_engine_receives_failed", "Grants whose KV did not come whole, or not true."
)
GRANTS_OPENED = counter("microserve_engine_grants_opened", "Grants given.")
GRANTS_REFUSED = counter("microserve_engine_grants_refused", "Grants refused for want of room.")
GRANTS_EXPIRED = counter(
    "microserve_engine_grants_expired", "Grants that nobody took in time.", vllm="nixl_num_kv_expired_reqs"
)
COMMITS = counter("microserve_engine_commits", "Received prefixes that were cached without a generation.")

# --- what it tells ---------------------------------------------------------------------------------

EVENTS = counter(
    "microserve_engine_kv_event_batches", "Batches of KV events: published, repeated, unsent.", "what"
)
REPLAYS = counter("microserve_engine_kv_event_replays", "Replays of KV events, by end.", "end")
REJECTED = counter("microserve_engine_frames_rejected", "Messages that nobody could read.")

ENGINE = (
    *(RUNNING, WAITING, WAITING_FOR, OLDEST_WAIT, QUEUED_TOKENS, BLOCKS, USAGE, GRANTS, OLDEST_LEASE),
    *(OLDEST_QUARANTINE, TIME_SHARE, DRAINING, ROUTERS, PREFILL_RATE, DECODE_STEP, CACHE_CONFIG, LORA, INFO),
    *(PREFIX_QUERIES, PREFIX_HITS, PROMPT_TOKENS, PROMPT_SOURCES, PROMPT_CACHED, GENERATED),
    *(FINISHED, PREEMPTIONS, TTFT, INTER_TOKEN, TPOT, E2E, ARRIVAL_TIME, QUEUE_TIME, PREFILL_TIME),
    *(DECODE_TIME, INFERENCE_TIME, PROMPT_LENGTH, OUTPUT_LENGTH, COMPUTED_LENGTH, MAX_TOKENS, N, CUT_OFF),
    *(STEP_TOKENS, STEP_SECONDS, STEPS_FAILED, EARLY_STARTS),
    *(SEND_SECONDS, SEND_NBYTES, SENDS_FAILED, RECEIVE_SECONDS, RECEIVE_NBYTES, RECEIVES_FAILED),
    *(GRANTS_OPENED, GRANTS_REFUSED, GRANTS_EXPIRED, COMMITS, EVENTS, REPLAYS, REJECTED),
)
