"""An adapter through a whole mesh: a client names it as its model, gateway and router know it, and two
engines of vLLM's serve one prompt of it together, with the tokens of one that serves it alone."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.engine.model.tiny_adapter import make_tiny_adapter
from tests.support.engine.model.tiny_model import make_tiny_model
from tests.support.vllm.mesh import ENGINES, VllmMesh, until
from tests.support.vllm.stream import SERVED_S, new_prompt

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

SETTINGS = {
    "model.dtype": "float32",
    "engine.max_model_len": 512,
    "engine.max_num_seqs": 4,
    "kvcache.block_size": 32,
    "vllm.kv_cache_mb": 16,
    "vllm.enforce_eager": True,
    "bus.liveness": 20,
}
NUM_TOKENS = 12


@pytest.fixture(scope="module")
def mesh(vllm_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmMesh]:
    directory = tmp_path_factory.mktemp("adapters")
    model = make_tiny_model(
        directory / "tiny", hidden_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=64
    )
    adapter = make_tiny_adapter(directory / "sql", model, seed=1)
    with VllmMesh(
        model, vllm_python, directory, {**SETTINGS, "model.adapters": {"sql": str(adapter)}}
    ) as mesh:
        yield mesh
        assert mesh.down().stdout == "stopped\n"
        asyncio.run(until(lambda: not mesh.left(), "nothing is left", 60.0))


def answer(mesh: VllmMesh, model: str, prompt: list[int], strategy: str) -> tuple[str, str]:
    """Its text, and the request's id."""
    body = {"model": model, "prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
    reply = httpx.post(
        f"{mesh.state.url}/v1/completions",
        json=body,
        headers={"x-microserve-strategy": strategy},
        timeout=SERVED_S,
    )
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["text"], reply.headers["x-request-id"]


def engines(mesh: VllmMesh, request_id: str) -> set[str]:
    asyncio.run(until(lambda: mesh.engines_of(request_id), "the router has told of it", 60.0))
    return mesh.engines_of(request_id)


def test_two_engines_serve_an_adapter_as_one_does(mesh: VllmMesh) -> None:
    prompt = new_prompt(200)
    alone, of_one = answer(mesh, "sql", prompt, "data_parallel")
    base, _ = answer(mesh, "tiny", prompt, "data_parallel")
    assert alone != base, "the adapter changes what the model says"
    for strategy in ("disaggregated", "balanced"):
        other = new_prompt(200)
        together, of_two = answer(mesh, "sql", other, strategy)
        assert engines(mesh, of_two) == set(ENGINES)
        again, _ = answer(mesh, "sql", other, "data_parallel")
        plain, _ = answer(mesh, "tiny", other, "data_parallel")
        assert together == again != plain
    assert len(engines(mesh, of_one)) == 1


def test_models_are_listed_and_one_that_nobody_has_is_the_clients_mistake(mesh: VllmMesh) -> None:
    listed = httpx.get(f"{mesh.state.url}/v1/models", timeout=SERVED_S).json()["data"]
    assert {each["id"] for each in listed} == {"tiny", "sql"}
    body = {"model": "poet", "prompt": "a", "max_tokens": 1}
    reply = httpx.post(f"{mesh.state.url}/v1/completions", json=body, timeout=SERVED_S)
    assert reply.status_code == 404 and "poet" in reply.text
