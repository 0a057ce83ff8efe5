"""What other people's routers and load balancers ask of a worker."""

from __future__ import annotations

from pathlib import Path

import httpx

from tests.support.gateway.gateway_world import MAX_MODEL_LEN, gateway_world, run


def test_sglangs_router_hears_which_model_this_is(model: Path) -> None:
    async def main() -> None:
        async with gateway_world(model) as world, httpx.AsyncClient(base_url=world.address) as http:
            for path in ("/server_info", "/get_server_info"):
                said = (await http.get(path)).json()
                assert (said["model_path"], said["served_model_name"]) == ("tiny", "tiny")
                assert (said["tp_size"], said["dp_size"]) == (1, 1)
                assert said["max_total_num_tokens"] == MAX_MODEL_LEN and said["version"]
            for path in ("/model_info", "/get_model_info"):
                said = (await http.get(path)).json()
                assert said == {"model_path": "tiny", "tokenizer_path": "tiny", "is_generation": True}

    run(main())


def test_a_load_balancer_scrapes_the_load_of_the_engines(model: Path) -> None:
    async def main() -> None:
        async with gateway_world(model) as world, httpx.AsyncClient(base_url=world.address) as http:
            world.routers[0].engines_load = (5, 2, 0.25)
            expected = {
                'vllm:num_requests_running{model_name="tiny"} 5.0',
                'vllm:num_requests_waiting{model_name="tiny"} 2.0',
                'vllm:kv_cache_usage_perc{model_name="tiny"} 0.25',
            }
            lines: set[str] = set()
            while not expected <= lines:
                lines = set((await http.get("/metrics?names=vllm")).text.splitlines())

    run(main())
