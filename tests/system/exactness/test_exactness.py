"""A cut of ``make exactness`` on real processes: every strategy gives the tokens of ``transformers``, and the
bits of a request that is alone, in bf16 too."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from tests.support.engine.model.families import make_model
from tests.support.engine.model.tiny_model import write_tokenizer
from tests.support.process.bitwise import HARMS, ask_alone, check_bits
from tests.support.process.cases import all_kinds, make_cases
from tests.support.process.exactness import HARMED_UNDER, PATIENT, SETTINGS, STRATEGIES, check, oracle
from tests.support.process.processes import MeshProcesses

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]

IN_FP32 = [*SETTINGS, "model.dtype=float32"]
"""As the oracle computes."""


@pytest.mark.parametrize("num_engines", [pytest.param(1, marks=pytest.mark.heavy), 3])
def test_tiny_model(tiny_model: Path, tmp_path: Path, num_engines: int) -> None:
    config = json.loads((tiny_model / "config.json").read_text())
    cases = make_cases(24, vocab_size=config["vocab_size"], max_prompt=500, seed=5)
    expected = oracle(tiny_model, cases)
    with MeshProcesses(tiny_model, tmp_path, num_engines=num_engines, settings=IN_FP32) as mesh:
        wrong = asyncio.run(check(mesh.router_address, cases, expected, STRATEGIES, num_engines))
    assert wrong == 0


@pytest.mark.parametrize("family", ["lfm2", pytest.param("qwen3_next", marks=pytest.mark.heavy)])
def test_a_hybrid_model(family: str, tmp_path: Path) -> None:
    """Its state moves with its KV under every strategy. No bits are promised, so no tokens are drawn."""
    model = make_model(tmp_path / family, family, max_position_embeddings=4096)
    write_tokenizer(model, 320)
    cases = [each for each in make_cases(24, vocab_size=320, max_prompt=200, seed=7) if each.greedy]
    expected = oracle(model, cases)
    with MeshProcesses(model, tmp_path, num_engines=3, settings=IN_FP32) as mesh:
        assert asyncio.run(check(mesh.router_address, cases, expected, STRATEGIES, 3)) == 0


@pytest.mark.heavy
def test_demo_model(demo_model: Path, tmp_path: Path) -> None:
    cases = make_cases(8, vocab_size=49152, max_prompt=300, seed=2)
    expected = oracle(demo_model, cases)
    settings = [*IN_FP32, "kvcache.num_blocks=1024", "bus.stuck_s=60"]
    with MeshProcesses(demo_model, tmp_path, settings=settings) as mesh:
        wrong = asyncio.run(check(mesh.router_address, cases, expected, STRATEGIES, 2))
    assert wrong == 0


@pytest.mark.heavy
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_bits(tiny_model: Path, tmp_path: Path, dtype: str) -> None:
    """Also of those with grammars, with calls and with n = 3, and of those that lost an engine meanwhile."""
    config = json.loads((tiny_model / "config.json").read_text())
    plain = make_cases(40, vocab_size=config["vocab_size"], max_prompt=500, seed=5)
    cases = all_kinds(plain, config["vocab_size"])
    settings = [*SETTINGS, *PATIENT, f"model.dtype={dtype}"]
    with MeshProcesses(tiny_model, tmp_path, num_engines=1, settings=settings) as mesh:
        promise, reference = asyncio.run(ask_alone(mesh.router_address, cases))
    assert promise is not None
    assert dtype in promise.name
    with MeshProcesses(tiny_model, tmp_path, settings=settings) as mesh:
        assert (
            asyncio.run(check_bits(mesh, cases, reference, STRATEGIES, dict.fromkeys(HARMS, HARMED_UNDER)))
            == 0
        )
