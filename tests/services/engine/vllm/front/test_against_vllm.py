"""A stream through our front against vLLM alone: the same tokens, log-probabilities and ends, whatever the
parameters. vLLM is asked in its own words, in a process of its own."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from microserve.protocol.bus.curve import CurveKeys, create_mesh_keys, keys_of_role
from microserve.protocol.bus.transport import ZmqBus
from microserve.protocol.messages.request.sampling import SamplingParams
from tests.support.engine.model.tiny_model import EOS, make_tiny_model
from tests.support.engine_conformance.engine_process import READY_S, EngineProcess, Launch
from tests.support.engine_conformance.wire_client import WireClient

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1_800)]

SETTINGS = {
    "bus.liveness": "20",
    "engine.backend": "vllm",
    "engine.max_model_len": "512",
    "engine.max_num_seqs": "4",
    "kvcache.block_size": "32",
    "model.dtype": "float32",
    "vllm.kv_cache_mb": "16",
    "vllm.enforce_eager": "true",
}
ALONE = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    model, asked = sys.argv[1], json.loads(sys.stdin.read())
    llm = LLM(model, dtype="float32", block_size=32, max_model_len=512, max_num_seqs=4, enforce_eager=True,
              kv_cache_memory_bytes=16 << 20, enable_prefix_caching=True, max_num_batched_tokens=512)
    for tokens, params in asked:
        if "logit_bias" in params:
            params["logit_bias"] = {int(token): bias for token, bias in params["logit_bias"].items()}
        said = llm.generate({"prompt_token_ids": tokens}, SamplingParams(**params), use_tqdm=False)[0]
        one = said.outputs[0]
        rows = [row[token].logprob for token, row in zip(one.token_ids, one.logprobs or [])]
        print("ANSWER", json.dumps([list(one.token_ids), rows, one.finish_reason]))
"""


@dataclass(frozen=True)
class Case:
    ours: dict[str, Any]
    vllms: dict[str, Any]
    length: int = 50


CASES = {
    "greedy": Case({"temperature": 0.0}, {"temperature": 0.0}),
    "from the cache": Case({"temperature": 0.0}, {"temperature": 0.0}, length=97),
    "from the cache again": Case({"temperature": 0.0}, {"temperature": 0.0}, length=97),
    "seeded": Case({"temperature": 0.8, "seed": 11}, {"temperature": 0.8, "seed": 11}),
    "cut": Case(
        {"temperature": 1.5, "seed": 5, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
        {"temperature": 1.5, "seed": 5, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
    ),
    "penalties": Case(
        {"temperature": 0.0, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.7},
        {"temperature": 0.0, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.7},
    ),
    "biased": Case(
        {"temperature": 0.0, "logit_bias": {77: 60.0}}, {"temperature": 0.0, "logit_bias": {"77": 60.0}}
    ),
    "ends by itself": Case(
        {"temperature": 0.0, "logit_bias": {EOS: 100.0}, "min_tokens": 3},
        {"temperature": 0.0, "logit_bias": {str(EOS): 100.0}, "min_tokens": 3},
    ),
    "does not end by itself": Case(
        {"temperature": 0.0, "logit_bias": {EOS: 100.0}, "ignore_eos": True},
        {"temperature": 0.0, "logit_bias": {str(EOS): 100.0}, "ignore_eos": True},
    ),
    "ends by a stop token": Case(
        {"temperature": 0.0, "logit_bias": {77: 60.0}, "stop_token_ids": (77,)},
        {"temperature": 0.0, "logit_bias": {"77": 60.0}, "stop_token_ids": [77]},
    ),
}


def prompt_of(case: Case) -> list[int]:
    return [20 + (7 * place + case.length) % 200 for place in range(case.length)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(
        tmp_path_factory.mktemp("model") / "tiny",
        hidden_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
    )


@pytest.fixture(scope="module")
def alone(model: Path, vllm_python: Path) -> dict[str, Any]:
    """vLLM's own answers, one after the other."""
    asked = [(prompt_of(case), {"max_tokens": 10, "logprobs": 0, **case.vllms}) for case in CASES.values()]
    ran = subprocess.run(
        [vllm_python, "-c", ALONE, model],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        timeout=1_200,
        check=False,
    )
    answers = [line.removeprefix("ANSWER ") for line in ran.stdout.splitlines() if line.startswith("ANSWER ")]
    assert len(answers) == len(CASES), ran.stderr[-3000:]
    return dict(zip(CASES, map(json.loads, answers), strict=True))


@pytest.fixture(scope="module")
def streamed(model: Path, vllm_python: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same by an engine of ours, in the same order."""
    keys = create_mesh_keys(tmp_path_factory.mktemp("keys"))
    command = f"{sys.executable} -m microserve.services.command.main"
    launch = Launch(model, keys, command, "", {**SETTINGS, "vllm.python": str(vllm_python)})
    engine = EngineProcess.start(launch, "e", tmp_path_factory.mktemp("engine"))
    try:
        return asyncio.run(_ask(engine, CurveKeys.load(keys_of_role(keys, "router"))))
    finally:
        engine.stop()


async def _welcome(bus: ZmqBus, engine: EngineProcess) -> WireClient:
    """Once it serves; one that ends is an error at once."""
    client = WireClient(bus, engine.address, engine.server_key)
    async with asyncio.timeout(READY_S):
        while True:
            engine.require_alive()
            try:
                await client.hello()
            except TimeoutError:
                continue
            return client


async def _ask(engine: EngineProcess, keys: CurveKeys) -> dict[str, Any]:
    bus = ZmqBus(keys=keys)
    answers: dict[str, Any] = {}
    try:
        client = await _welcome(bus, engine)
        for name, case in CASES.items():
            params = SamplingParams(max_tokens=10, logprobs=0, **case.ours)
            await client.start_generate(name, 0, params, prompt_of(case))
            stream = await client.finished(name)
            assert stream.finished is not None
            rows = [each.logprob for each in stream.logprobs]
            answers[name] = (list(stream.token_ids), rows, stream.finished)
        client.close()
    finally:
        bus.close()
    return answers


@pytest.mark.parametrize("name", CASES)
def test_a_stream_is_vllms_own(name: str, alone: dict[str, Any], streamed: dict[str, Any]) -> None:
    expected_ids, expected_rows, expected_end = alone[name]
    token_ids, rows, finished = streamed[name]
    assert token_ids == expected_ids
    assert rows == pytest.approx(expected_rows, abs=1e-4)
    assert finished.reason == expected_end
    assert finished.usage.output_tokens == len(expected_ids)


def test_a_cached_prefix_is_said(streamed: dict[str, Any]) -> None:
    assert streamed["from the cache"][2].usage.cached_tokens == 0
    assert streamed["from the cache again"][2].usage.cached_tokens == 96
