"""The class of the transformers path: told by what decides its numbers, and never exact."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from microserve.protocol.messages.numerics import fault_of_numerics
from microserve.services.engine.model.model import ModelSpec
from microserve.services.engine.model.numerics import transformers_numerics

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
