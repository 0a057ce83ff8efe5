"""Which models become exact, what of them is replaced, and what their class says; what it computes:
tests/kernels/interpreted/exact_step.py."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from structlog.testing import capture_logs

from microserve.protocol.errors import ConfigError
from microserve.protocol.messages.numerics import fault_of_numerics
from microserve.protocol.settings.sources import load_settings
from microserve.services.engine.model.attention.step import ExactAttention, exact_attention
from microserve.services.engine.model.attention_choice import EXACT, choose_kernels
from microserve.services.engine.model.device import exact
from microserve.services.engine.model.device.exact import class_name, make_exact
from microserve.services.engine.model.model import LoadedModel, load_model
from microserve.services.engine.model.rope import rope_tables
from microserve.services.engine.model.runner import ModelRunner
from tests.support.engine.model.tiny_model import FAMILIES, make_tiny_model

CPU = torch.device("cpu")


def load(tmp_path: Path, family: str = "llama", dtype: str = "bfloat16") -> LoadedModel:
    return load_model(make_tiny_model(tmp_path / family, family), dtype=dtype)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_that_adds_up_is_replaced(tmp_path: Path, family: str) -> None:
    pytest.importorskip("triton", reason="no triton: nothing is exact on a GPU")
    loaded = load(tmp_path, family)
    weights = {name: tensor.data_ptr() for name, tensor in loaded.module.named_parameters()}
    model = make_exact(loaded)
    kinds = {
        type(part).__name__
        for part in model.module.modules()
        if not any(True for _ in part.children()) and not isinstance(part, torch.nn.Embedding)
    }
    assert kinds == {"ExactLinear", "ExactNorm", "ExactSilu", "ExactRotary"}
    # The same weights, under the same names, tied as they were.
    assert {name: tensor.data_ptr() for name, tensor in model.module.named_parameters()} == weights
    assert model.numerics is not None and model.numerics.is_exact
    assert not fault_of_numerics(model.numerics)


def test_rope_is_what_transformers_computes(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="no triton: nothing is exact on a GPU")
    x, positions = torch.zeros(1, 3, 8), torch.tensor([[0, 7, 4000]])
    plain: Any = load(tmp_path, dtype="float32").module
    ours: Any = make_exact(load(tmp_path, dtype="float32")).module
    for have, want in zip(
        ours.model.rotary_emb(x, position_ids=positions),
        plain.model.rotary_emb(x, position_ids=positions),
        strict=True,
    ):
        assert have.shape == want.shape
        torch.testing.assert_close(have, want, atol=1e-6, rtol=1e-6)


def test_a_part_that_is_not_known_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="no triton: nothing is exact on a GPU")
    model = load(tmp_path)
    module: Any = model.module
    module.model.layers[1].mlp.act_fn = torch.nn.GELU()
    with pytest.raises(ConfigError, match=r"model.layers.1.mlp.act_fn, a GELU") as refused:
        make_exact(model)
    assert refused.value.field == "engine.cuda_exact"


def test_without_triton_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="needs Triton") as refused:
        make_exact(model)
    assert refused.value.field == "engine.cuda_exact"


def test_a_class_is_of_kernels_architecture_dtype_weights_and_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(tmp_path)
    module: Any = model.module
    cos, sin = rope_tables(module.model.rotary_emb, 64)
    gpu = torch.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    names = {
        class_name(model, (cos, sin), gpu),
        class_name(model, (cos, sin), CPU),
        class_name(model, (cos, cos), gpu),
        class_name(replace(model, spec=replace(model.spec, revision="other")), (cos, sin), gpu),
        class_name(replace(model, spec=replace(model.spec, dtype="float16")), (cos, sin), gpu),
    }
    assert len(names) == 5
    assert class_name(model, (cos, sin), gpu).startswith("triton-sm90-bfloat16-")
    before = class_name(model, (cos, sin), gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert class_name(model, (cos, sin), gpu) != before
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(exact, "kernels_digest", lambda: "other")
    assert class_name(model, (cos, sin), gpu) != before


def test_its_runner_says_the_class_and_attends_in_segments(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="no triton: nothing is exact on a GPU")
    model = make_exact(load(tmp_path))
    runner = ModelRunner(model, np.zeros(1 << 16, np.uint8), 4, 4)
    assert runner.numerics == model.numerics
    assert runner._make_attention is exact_attention
    assert runner._graph_attention is ExactAttention
    with capture_logs() as events:
        assert choose_kernels(EXACT, model.spec, 16, CPU, {}) is exact_attention
    assert events[0]["attention"] == "exact"


def test_flashinfer_cannot_be_exact() -> None:
    overrides = ["engine.device=cuda:0", "engine.cuda_exact=true", "model.dtype=bfloat16"]
    assert load_settings(overrides=overrides).engine.cuda_exact
    assert load_settings(overrides=[*overrides, "engine.attention=triton"]).engine.cuda_exact
    with pytest.raises(ConfigError, match="no exact bits") as refused:
        load_settings(overrides=[*overrides, "engine.attention=flashinfer"])
    assert refused.value.field == "engine.attention"
