"""Names of attributes, in one table: OpenTelemetry's conventions for generative AI, and what is ours.

These conventions are still in development, so a change of theirs is one edit here. Where vLLM's spans and the
boards made for them use an older name, both are written. There is no name for a prompt or an answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Value = str | bool | int | float | Sequence[str]

NAMES: Mapping[str, tuple[str, ...]] = {
    # What was asked for.
    "operation": ("gen_ai.operation.name",),
    "provider": ("gen_ai.provider.name",),
    "model": ("gen_ai.request.model", "gen_ai.response.model"),
    "request_id": ("gen_ai.request.id", "microserve.request_id"),
    "max_tokens": ("gen_ai.request.max_tokens",),
    "temperature": ("gen_ai.request.temperature",),
    "top_p": ("gen_ai.request.top_p",),
    "top_k": ("gen_ai.request.top_k",),
    "presence_penalty": ("gen_ai.request.presence_penalty",),
    "frequency_penalty": ("gen_ai.request.frequency_penalty",),
    "num_choices": ("gen_ai.request.choice.count", "gen_ai.request.n"),
    "stream": ("gen_ai.request.stream",),
    # What came of it.
    "finish_reasons": ("gen_ai.response.finish_reasons",),
    "input_tokens": ("gen_ai.usage.input_tokens", "gen_ai.usage.prompt_tokens"),
    "output_tokens": ("gen_ai.usage.output_tokens", "gen_ai.usage.completion_tokens"),
    "cached_tokens": ("gen_ai.usage.cache_read.input_tokens",),
    "reasoning_tokens": ("gen_ai.usage.reasoning.output_tokens",),
    "ttft_s": ("gen_ai.response.time_to_first_chunk", "gen_ai.latency.time_to_first_token"),
    "wall_s": ("gen_ai.latency.e2e",),
    "queued_s": ("gen_ai.latency.time_in_queue",),
    "prefill_s": ("gen_ai.latency.time_in_model_prefill",),
    "decode_s": ("gen_ai.latency.time_in_model_decode",),
    "error": ("error.type",),
    # HTTP.
    "method": ("http.request.method",),
    "path": ("url.path",),
    "status": ("http.response.status_code",),
}
"""By what services call it; whatever is not here is ``microserve.`` and that."""


def names_of(name: str) -> tuple[str, ...]:
    """All that a value has on its way to a collector."""
    return NAMES.get(name) or (f"microserve.{name}",)
