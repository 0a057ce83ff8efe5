"""Metrics: what happened is counted under our names, and under vLLM's where both mean the same."""

from __future__ import annotations

import asyncio
import re

from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from microserve.gateway.metrics import CACHE_S, VLLM_NAMES, GatewayMetrics, Levels

LEVELS = Levels(
    num_choices=3,
    mailbox_tokens=4,
    bus_dropped=5,
    bus_failed=6,
    routers_alive=2,
    log_dropped={"ENOSPC": 8},
    log_left_out=9,
    engines_running=10,
    engines_waiting=11,
    kv_usage=0.5,
)


def text_of(metrics: GatewayMetrics, *, vllm_names: bool = False) -> bytes:
    async def collect() -> list[Metric]:
        return await metrics.families(LEVELS)

    return asyncio.run(metrics.text(collect, vllm_names=vllm_names))


def samples(text: bytes) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def value(text: bytes, name: str, **labels: str) -> float:
    return samples(text)[name, frozenset(labels.items())]


def make() -> tuple[GatewayMetrics, list[float]]:
    clock = [0.0]
    metrics = GatewayMetrics("m", lambda: clock[0])
    metrics.submitted(7, 1, 16)
    metrics.first_token(0.03)
    metrics.next_tokens(0.4, 4)
    metrics.choice_ended("stop", 5)
    metrics.answered(200, "ok", 1.5)
    metrics.answered(400, "invalid_request", 0.1)
    metrics.disconnected("prefill")
    metrics.lag.late.observe(0.002)
    return metrics, clock


def test_everything_is_counted() -> None:
    text = text_of(make()[0])
    assert value(text, "microserve_loop_lag_seconds_count") == 1
    assert value(text, "microserve_prompt_tokens_total", model_name="m") == 7
    assert value(text, "microserve_generation_tokens_total", model_name="m") == 5
    assert value(text, "microserve_request_success_total", model_name="m", finished_reason="stop") == 1
    assert value(text, "microserve_http_responses_total", status="200", code="ok") == 1
    assert value(text, "microserve_http_responses_total", status="400", code="invalid_request") == 1
    assert value(text, "microserve_disconnects_total", phase="prefill") == 1
    assert value(text, "microserve_requests_running", model_name="m") == 3
    assert value(text, "microserve_mailbox_tokens") == 4
    assert value(text, "microserve_bus_dropped_total") == 5
    assert value(text, "microserve_bus_failed_total") == 6
    assert value(text, "microserve_log_dropped_total", reason="ENOSPC") == 8
    assert value(text, "microserve_log_left_out_total") == 9
    assert value(text, "microserve_routers_alive") == 2
    assert value(text, "microserve_mesh_requests_running", model_name="m") == 10
    assert value(text, "microserve_mesh_requests_waiting", model_name="m") == 11
    assert value(text, "microserve_mesh_kv_cache_usage_ratio", model_name="m") == 0.5
    bucket = "microserve_time_to_first_token_seconds_bucket"
    assert value(text, bucket, model_name="m", le="0.02") == 0
    assert value(text, bucket, model_name="m", le="0.04") == 1
    assert value(text, "microserve_inter_token_latency_seconds_sum", model_name="m") == 0.1
    assert value(text, "microserve_e2e_request_latency_seconds_count", model_name="m") == 1


def test_vllm_names_are_the_same_numbers() -> None:
    ours = samples(text_of(make()[0]))
    theirs = samples(text_of(make()[0], vllm_names=True))
    renamed = {}
    suffix = re.compile(r"(.*?)(_total|_bucket|_count|_sum)?")
    for (name, labels), number in ours.items():
        told = suffix.fullmatch(name)
        stem, rest = (name, "") if name in VLLM_NAMES or not told else (told[1], told[2] or "")
        for alias in VLLM_NAMES.get(stem, (stem,)):
            renamed[alias + rest, labels] = number
    process = {key for key in renamed if key[0].startswith(("process_", "microserve_metrics_cpu_"))}
    assert {k: v for k, v in renamed.items() if k not in process} == {
        k: v for k, v in theirs.items() if k not in process
    }
    names = {name for name, _ in theirs}
    assert {"vllm:prompt_tokens_total", "vllm:time_to_first_token_seconds_bucket"} <= names
    # What load balancers scrape.
    assert {"vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"} <= names
    assert "microserve_requests_running" in names  # vLLM's counts only what its engine runs
    assert not any(name.endswith("_created") for name in names)


def test_the_text_is_kept_for_a_second() -> None:
    metrics, clock = make()
    first = text_of(metrics)
    metrics.submitted(1, 1, 16)
    assert text_of(metrics) is first
    clock[0] = CACHE_S
    assert value(text_of(metrics), "microserve_prompt_tokens_total", model_name="m") == 8
