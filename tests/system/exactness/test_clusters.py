"""Prompts that another cluster computes, on real processes: the tokens of ``transformers``, also when the
engine there is killed in the middle of it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from microserve.protocol.bus.transport import ZmqBus
from tests.support.bus.gateway_peer import BusClient
from tests.support.engine.model.families import make_model
from tests.support.engine.model.tiny_model import write_tokenizer
from tests.support.process.bitwise import crowd
from tests.support.process.cases import Case, make_cases
from tests.support.process.exactness import mismatches, oracle
from tests.support.process.processes import MeshProcesses

pytestmark = [pytest.mark.system, pytest.mark.timeout(400)]

IN_FP32 = [
    "model.dtype=float32",
    "router.strategies.prfaas={threshold=64,replan=false}",
    "router.call_timeout_s=120",
]
CLUSTERS = {
    0: ["engine.cluster=near", 'engine.labels=["decode"]'],
    1: ["engine.cluster=near", 'engine.labels=["prefill"]'],
    2: ["engine.cluster=far", 'engine.labels=["prefill"]'],
}


async def asked(mesh: MeshProcesses, cases: list[Case], *, kill: bool) -> list[Any]:
    bus = ZmqBus()
    harm = mesh.services["engine-2"].kill if kill else None
    try:
        async with BusClient(bus, mesh.router_address) as client:
            await client.wait_engines(3)
            return list(await crowd(client, "prfaas", cases, harm=harm))
    finally:
        bus.close()


@pytest.mark.parametrize("kill", [False, True], ids=["calm", "killed"])
def test_computed_there_or_here_the_answers_are_the_same(
    tiny_model: Path, tmp_path: Path, kill: bool
) -> None:
    config = json.loads((tiny_model / "config.json").read_text())
    cases = make_cases(24, vocab_size=config["vocab_size"], max_prompt=400, seed=11)
    expected = oracle(tiny_model, cases)
    with MeshProcesses(
        tiny_model, tmp_path, num_engines=3, settings=IN_FP32, engine_settings=CLUSTERS
    ) as mesh:
        answers = asyncio.run(asked(mesh, cases, kill=kill))
    assert [answer.reason for answer in answers] == ["length"] * len(cases)
    assert mismatches(cases, expected, [answer.token_ids for answer in answers]) == []
    long = [answer for case, answer in zip(cases, answers, strict=True) if len(case.prompt) > 64]
    assert long
    if not kill:
        assert any("engine-2" in answer.result.engines for answer in long)
        short = [answer for case, answer in zip(cases, answers, strict=True) if len(case.prompt) <= 64]
        assert not any("engine-2" in answer.result.engines for answer in short)


def test_a_hybrid_model_s_state_goes_over_the_link_with_its_kv(tmp_path: Path) -> None:
    """No bits are promised of it, so no tokens are drawn."""
    model = make_model(tmp_path / "lfm2", "lfm2", max_position_embeddings=4096)
    write_tokenizer(model, 320)
    cases = [each for each in make_cases(24, vocab_size=320, max_prompt=200, seed=7) if each.greedy]
    expected = oracle(model, cases)
    with MeshProcesses(model, tmp_path, num_engines=3, settings=IN_FP32, engine_settings=CLUSTERS) as mesh:
        answers = asyncio.run(asked(mesh, cases, kill=False))
    assert mismatches(cases, expected, [answer.token_ids for answer in answers]) == []
    assert any("engine-2" in answer.result.engines for answer in answers)
