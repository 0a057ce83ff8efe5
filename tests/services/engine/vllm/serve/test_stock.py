"""A stock ``vllm serve`` in a mesh: the server's own tokens, and a plain word where KV is asked for."""

from __future__ import annotations

import json
import os
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from tests.support.engine.model.tiny_model import make_tiny_model
from tests.support.process.processes import MeshProcesses, free_port

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1_200)]

READY_S = 900.0
PROMPT = list(range(40, 110))


def ask(url: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            content = response.read()
            return response.status, json.loads(content) if content else None
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a head size that vLLM has kernels for."""
    return make_tiny_model(
        tmp_path_factory.mktemp("model") / "tiny",
        num_hidden_layers=4,
        hidden_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
    )


@pytest.fixture(scope="module")
def stock(vllm_python: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Its address. Started as anybody would."""
    port, log = free_port(), tmp_path_factory.mktemp("stock") / "serve.log"
    words = (
        f"--host 127.0.0.1 --port {port} --dtype bfloat16 --block-size 32 --enforce-eager --enable-scale-out"
    )
    words += (
        f" --kv-cache-memory-bytes {32 << 20} --max-model-len 512 --served-model-name tiny --api-key secret"
    )
    command = [str(vllm_python), "-P", "-m", "vllm.entrypoints.cli.main", "serve", str(model), *words.split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with log.open("w") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=sink, env=environment, process_group=0)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + READY_S
        while True:
            try:
                if ask(f"{url}/health")[0] == 200:
                    break
            except OSError:
                pass
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture(scope="module")
def mesh(stock: str, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MeshProcesses]:
    settings = ["engine.backend=vllm-serve", f"vllm.url={stock}", "vllm.api_key=secret", "model.name=tiny"]
    directory = tmp_path_factory.mktemp("mesh")
    with MeshProcesses(model, directory, num_engines=1, gateway=True, settings=settings) as running:
        yield running


def completed(mesh: MeshProcesses, body: dict[str, Any], **headers: str) -> tuple[int, Any]:
    return ask(f"http://127.0.0.1:{mesh.gateway_port}/v1/completions", {"model": "tiny", **body}, **headers)


def test_a_mesh_gives_the_servers_own_tokens(mesh: MeshProcesses, stock: str) -> None:
    sampling = {"max_tokens": 24, "temperature": 0.0, "logprobs": 2, "stop_token_ids": [], "ignore_eos": True}
    body = {"token_ids": PROMPT, "sampling_params": sampling}
    status, own = ask(f"{stock}/inference/v1/generate", body, authorization="Bearer secret")
    assert status == 200
    asked = {"prompt": PROMPT, "max_tokens": 24, "temperature": 0, "logprobs": 2, "ignore_eos": True}
    status, ours = completed(mesh, asked)
    assert status == 200, ours
    [choice] = ours["choices"]
    [theirs] = own["choices"]
    tokenizer = Tokenizer.from_file(str(mesh.model / "tokenizer.json"))
    assert choice["text"] == tokenizer.decode(theirs["token_ids"], skip_special_tokens=False)
    rated = [each["logprob"] for each in theirs["logprobs"]["content"]]
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(rated, abs=0.02)
    assert ours["usage"]["completion_tokens"] == 24


def test_a_strategy_that_needs_kv_is_served_by_one_engine_or_told(mesh: MeshProcesses) -> None:
    asked = {"prompt": PROMPT, "max_tokens": 4, "temperature": 0}
    status, answer = completed(mesh, asked, **{"x-microserve-strategy": "disaggregated"})
    assert status == 200, answer
    deadline = time.monotonic() + 60
    while not (lines := told_of(mesh, "disaggregated")):  # it is written when the answer has gone
        assert time.monotonic() < deadline
        time.sleep(0.05)
    [line] = lines
    assert line["alone"], line


def told_of(mesh: MeshProcesses, strategy: str) -> list[dict[str, Any]]:
    """The gateway's lines about requests of this strategy."""
    whole, _, _ = mesh.services["gateway"].log.read_text().rpartition("\n")
    return [line for line in map(json.loads, whole.splitlines()) if line.get("strategy") == strategy]


def test_what_vllm_refuses_is_the_clients_400(mesh: MeshProcesses) -> None:
    status, answer = completed(mesh, {"prompt": PROMPT, "max_tokens": 2, "temperature": 5.0})
    assert status == 400 and "temperature" in json.dumps(answer), answer
    status, answer = completed(mesh, {"prompt": list(range(500)), "max_tokens": 100})
    assert status == 400, answer
