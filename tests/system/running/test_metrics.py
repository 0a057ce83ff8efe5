"""A live mesh is measured: every service at its port, and by vLLM's names all that boards and autoscalers
read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from microserve.services.local.metric_ports import TARGETS
from tests.support.security.up_mesh import UpMesh, up_mesh

pytestmark = [pytest.mark.system, pytest.mark.timeout(400)]

BOARD = {
    "E2E Request Latency": ["e2e_request_latency_seconds_bucket", "e2e_request_latency_seconds_sum"],
    "Token Throughput": ["prompt_tokens_total", "generation_tokens_total"],
    "Inter Token Latency": ["inter_token_latency_seconds_bucket", "inter_token_latency_seconds_count"],
    "Scheduler State": ["num_requests_running", "num_requests_waiting"],
    "Time To First Token Latency": ["time_to_first_token_seconds_bucket", "time_to_first_token_seconds_sum"],
    "Cache Utilization": ["kv_cache_usage_perc"],
    "Request Prompt Length": ["request_prompt_tokens_bucket"],
    "Request Generation Length": ["request_generation_tokens_bucket"],
    "Finish Reason": ["request_success_total"],
    "Queue Time": ["request_queue_time_seconds_sum"],
    "Requests Prefill and Decode Time": [
        "request_prefill_time_seconds_sum",
        "request_decode_time_seconds_sum",
    ],
    "Max Generation Token in Sequence Group": ["request_max_num_generation_tokens_sum"],
}
"""Panels of vLLM's Grafana board, and what each asks Prometheus for."""
SCHEDULERS = [
    *("num_requests_waiting", "num_requests_running", "kv_cache_usage_perc"),
    *("cache_config_info", "lora_requests_info"),
]
"""llm-d's scrape of an engine, and the expressions of KEDA's and HPA's examples."""
OTHER_BOARDS = [
    *("request_time_per_output_token_seconds_bucket", "time_per_output_token_seconds_bucket"),
    *("request_inference_time_seconds_sum", "request_params_max_tokens_bucket", "request_params_n_bucket"),
    *("prefix_cache_queries_total", "prefix_cache_hits_total", "gpu_prefix_cache_queries_total"),
    *("gpu_prefix_cache_hits_total", "gpu_cache_usage_perc", "num_preemptions_total"),
    "prompt_tokens_by_source_total",
]
"""Of production-stack, AIBrix, KServe and vLLM's own; the gateway has these too."""
ENGINES_ONLY = [
    *("iteration_tokens_total_bucket", "num_requests_waiting_by_reason", "prompt_tokens_cached_total"),
    *("request_prefill_kv_computed_tokens_bucket", "nixl_xfer_time_seconds_bucket"),
    *("nixl_bytes_transferred_sum", "nixl_num_failed_transfers_total", "nixl_num_kv_expired_reqs_total"),
]

Samples = dict[str, list[tuple[dict[str, str], float]]]


def scrape(address: str, query: str = "") -> Samples:
    reply = httpx.get(f"http://{address}/metrics{query}", timeout=60)
    assert reply.status_code == 200, reply.text
    found: Samples = {}
    for family in text_string_to_metric_families(reply.text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def total(found: Samples, name: str, **labels: str) -> float:
    return sum(
        value
        for has, value in found.get(name, [])
        if all(has.get(key) == each for key, each in labels.items())
    )


@pytest.fixture(scope="module")
def mesh(tiny_model: Path) -> Iterator[UpMesh]:
    """Some requests by every way: alone, split, moved between engines, refused."""
    with up_mesh(tiny_model) as mesh:
        with httpx.Client(base_url=mesh.state.url, timeout=120) as http:
            for strategy in ("auto", "balanced", "disaggregated", "data_parallel"):
                for number in range(3):
                    body = {
                        "model": "tiny",
                        "prompt": [20 + number, *range(30, 90)],
                        "max_tokens": 12,
                        "ignore_eos": True,
                        "n": 1 + number % 2,
                    }
                    served_by = {"x-microserve-strategy": strategy}
                    reply = http.post("/v1/completions", json=body, headers=served_by)
                    assert reply.status_code == 200, reply.text
            refused = {"model": "tiny", "prompt": [1], "max_tokens": 1}
            served_by = {"x-microserve-strategy": "no"}
            assert http.post("/v1/completions", json=refused, headers=served_by).is_error
        yield mesh


def addresses(mesh: UpMesh) -> dict[str, str]:
    groups = json.loads((mesh.directory.root / TARGETS).read_text())
    return {group["labels"]["id"]: group["targets"][0] for group in groups}


def test_every_service_says_where_it_is_read(mesh: UpMesh) -> None:
    found = addresses(mesh)
    assert found.keys() == {"index", "router", "e0", "e1", "gateway"}
    assert found["gateway"] == mesh.state.url.partition("://")[2]
    shown = json.loads(mesh.run("ps", "--json").stdout)["children"]
    told = {child["name"].removeprefix("engine-"): child["metrics"] for child in shown if child["metrics"]}
    assert told == {name: address for name, address in found.items() if name != "gateway"}
    for address in told.values():
        assert httpx.get(f"http://{address}/health", timeout=60).status_code == 200


def test_boards_and_autoscalers_find_their_names(mesh: UpMesh) -> None:
    found = addresses(mesh)
    engines = [scrape(found[name], "?names=vllm") for name in ("e0", "e1")]
    gateway = scrape(found["gateway"], "?names=vllm")
    asked = [name for names in BOARD.values() for name in names]
    wanted = [*asked, *SCHEDULERS, *OTHER_BOARDS, *ENGINES_ONLY]
    assert [name for name in wanted if not any(f"vllm:{name}" in engine for engine in engines)] == []
    assert [name for name in [*asked, *OTHER_BOARDS] if f"vllm:{name}" not in gateway] == []
    for samples in (*engines, gateway):
        for name in asked:
            assert all(has["model_name"] == "tiny" for has, _ in samples[f"vllm:{name}"])
    for name in (*asked, *OTHER_BOARDS):  # of what has happened there are numbers, not only names
        may_be_0 = name.startswith("num_") or name.endswith("usage_perc")
        both = [sum(total(each, f"vllm:{name}") for each in engines), total(gateway, f"vllm:{name}")]
        assert may_be_0 or min(both) > 0, (name, both)
    [(config, _)] = engines[0]["vllm:cache_config_info"]
    assert (config["block_size"], config["num_gpu_blocks"]) == ("16", "64")


def test_the_numbers_agree_with_each_other(mesh: UpMesh) -> None:
    found = addresses(mesh)
    engines = [scrape(found[name]) for name in ("e0", "e1")]
    router, index, gateway = (scrape(found[name]) for name in ("router", "index", "gateway"))
    for engine in engines:
        blocks = engine["microserve_engine_kv_blocks"]
        assert sum(value for _, value in blocks) == 64 and min(value for _, value in blocks) >= 0
        steps = total(engine, "microserve_engine_step_seconds_count")
        assert steps == total(engine, "microserve_engine_step_tokens_count") > 0
    tokens = total(gateway, "microserve_generation_tokens_total")
    assert tokens == sum(total(each, "microserve_engine_generation_tokens_total") for each in engines)
    finished = total(gateway, "microserve_request_success_total", finished_reason="length")
    assert finished == total(router, "microserve_router_strategy_requests_total", result="length")
    ended = "microserve_engine_e2e_request_latency_seconds_count"
    assert finished == sum(total(each, ended) for each in engines)
    sent, received = (
        sum(total(each, f"microserve_engine_{way}_bytes_sum", heap="shm") for each in engines)
        for way in ("send", "receive")
    )
    assert sent > 0 and received >= sent  # a grant's blocks are whole, what is sent of them need not be
    phases = total(router, "microserve_router_phase_seconds_sum", strategy="disaggregated")
    whole = total(router, "microserve_router_strategy_job_completion_seconds_sum", strategy="disaggregated")
    assert phases == pytest.approx(whole)
    assert total(router, "microserve_router_picks_total", strategy="disaggregated") > 0
    assert total(router, "microserve_router_refused_total", code="strategy_not_found") == 1
    assert total(router, "microserve_router_engines", state="usable") == 2
    assert total(router, "microserve_router_link_goodput_bytes_per_second") > 0
    assert total(index, "microserve_index_members", model_name="tiny") == 2
    assert total(index, "microserve_index_feed_live") == 2
