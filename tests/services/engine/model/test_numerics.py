"""The class of the transformers path: told by what decides its numbers, and never exact."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from microserve.kernels.cpu.library import library
from microserve.kernels.kernel_cache import KernelUnavailable
from microserve.protocol.messages.numerics import Numerics, fault_of_numerics
from microserve.services.engine.model.model import DTYPES, load_model
from microserve.services.engine.model.numerics import transformers_numerics
from microserve.services.engine.model.spec import ModelSpec
from microserve.services.engine.native.packing import native_runner
from tests.support.engine.model.tiny_model import make_tiny_model

CPU = torch.device("cpu")
SPEC = ModelSpec(
    name="tiny",
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    vocab_size=100,
    max_model_len=64,
    eos_token_ids=frozenset({0}),
    dtype="bfloat16",
    sliding_windows=frozenset({None}),
    revision="3f2a9c0b5d1e" + "0" * 20,
)


def test_it_names_torch_device_dtype_and_revision() -> None:
    numerics = transformers_numerics(SPEC, CPU)

    assert numerics.name == f"torch{torch.__version__.partition('+')[0]}-cpu-bfloat16-3f2a9c0b5d1e"
    assert not numerics.is_exact and not fault_of_numerics(numerics)


@pytest.mark.parametrize("change", [{"dtype": "float32"}, {"revision": "1" * 32}, {"revision": ""}])
def test_another_dtype_or_revision_is_another_class(change: dict[str, str]) -> None:
    other = transformers_numerics(replace(SPEC, **change), CPU)  # type: ignore[arg-type]

    assert other.name != transformers_numerics(SPEC, CPU).name and not fault_of_numerics(other)


def test_a_device_is_named_by_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    names = iter(["NVIDIA H200", "Someone's (very) long & odd näme " * 4])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: next(names))

    assert "-nvidia-h200-" in transformers_numerics(SPEC, torch.device("cuda:0")).name
    assert not fault_of_numerics(transformers_numerics(SPEC, torch.device("cuda:0")))


@pytest.mark.slow
def test_engines_of_one_model_are_of_one_native_class_whatever_they_hold_and_run_on(tmp_path: Path) -> None:
    """Pools, threads and instructions are not in its name; dtype and weights are."""

    def numerics(num_blocks: int, variant: str = "auto", threads: int = 1, **how: Any) -> Numerics:
        model = load_model(make_tiny_model(tmp_path / f"seed{how.get('seed', 0)}", **how), dtype=dtype)
        spec = model.spec
        elements = spec.num_layers * num_blocks * 2 * 16 * spec.num_kv_heads * spec.head_dim
        data = np.zeros(elements * DTYPES[spec.dtype].itemsize, np.uint8)
        runner = native_runner(model, data, num_blocks, 16, threads=threads, max_rows=8, variant=variant)
        return runner.numerics

    dtype = "float32"
    try:
        ours = numerics(64)
    except KernelUnavailable as error:
        pytest.skip(str(error))
    assert ours.is_exact and not fault_of_numerics(ours)
    assert numerics(2) == numerics(64, "portable") == numerics(64, threads=2) == ours
    assert numerics(64, seed=1) != ours
    dtype = "bfloat16"
    blocks = numerics(64, "portable")
    assert ours.name.startswith("cpu1-float32-") and blocks.name.startswith("cpu1-bfloat16-")
    if library().supports("avx512bf16"):
        pairs = numerics(64, "avx512bf16")
        assert pairs.name.startswith("cpu2-bfloat16-") and pairs.is_exact
        assert pairs == numerics(2, "avx512bf16", threads=2) and numerics(64, "avx512") == blocks
