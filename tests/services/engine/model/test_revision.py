"""A revision is equal where KV would be, and is of what was loaded, whatever becomes of the files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from microserve.services.engine.model.model import LoadedModel, load_model
from tests.support.engine.model.tiny_model import FAMILIES, make_tiny_model


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return make_tiny_model(tmp_path / "tiny-llama")


def revision(directory: Path, **options: Any) -> str:
    return load_model(directory, **{"dtype": "float32", **options}).spec.revision


def edit(directory: Path, name: str, **changes: Any) -> None:
    content = json.loads((directory / name).read_text())
    (directory / name).write_text(json.dumps({**content, **changes}))


def test_the_same_model_anywhere_has_the_same(llama: Path, tmp_path: Path) -> None:
    first = revision(llama)
    assert len(first) == 32
    copy = shutil.copytree(llama, tmp_path / "another-name")
    assert revision(copy) == first
    # What changes no KV: labels, which tokens mean what, and how the files are cut.
    edit(
        copy,
        "config.json",
        _name_or_path="x",
        transformers_version="5.0",
        architectures=None,
        dtype="float16",
    )
    edit(copy, "config.json", bos_token_id=9, eos_token_id=[4], pad_token_id=7, use_cache=False)
    edit(copy, "generation_config.json", eos_token_id=3, temperature=0.3)
    weights = load_file(copy / "model.safetensors")
    save_file(dict(reversed(weights.items())), copy / "model.safetensors", metadata={"format": "pt"})
    assert revision(copy) == first


@pytest.mark.parametrize(
    "changes",
    [
        {"rms_norm_eps": 1e-3},
        {"hidden_act": "gelu"},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
        {"max_position_embeddings": 2048},
        {"a_setting_of_a_later_version": 1},
    ],
)
def test_a_setting_that_may_change_kv_changes_it(llama: Path, changes: dict[str, Any]) -> None:
    first = revision(llama)
    edit(llama, "config.json", **changes)
    assert revision(llama) != first


def test_one_bit_of_one_weight_changes_it(llama: Path) -> None:
    first = revision(llama)
    weights = load_file(llama / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"].view(torch.int32)[3, 5] ^= 1
    save_file(weights, llama / "model.safetensors", metadata={"format": "pt"})
    assert revision(llama) != first


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, tmp_path: Path) -> None:
    one, other = make_tiny_model(tmp_path / "1", family), make_tiny_model(tmp_path / "2", family, seed=1)
    assert revision(one) == revision(one) != revision(other)


def test_dtypes_and_random_weights_are_others(llama: Path) -> None:
    kinds = [{}, {"dtype": "bfloat16"}, {"dtype": "float16"}, {"load_format": "random"}]
    assert len({revision(llama, **options) for options in kinds}) == len(kinds)


@pytest.mark.parametrize("how", ["written over", "cut short"])
def test_files_that_change_under_an_engine(llama: Path, tmp_path: Path, how: str) -> None:
    """F2. Weights that are loaded in the dtype of their file were a view of it: another model in place of a
    served one changed what was served, and a shorter one ended the process."""
    other = make_tiny_model(tmp_path / "other", seed=1)
    loaded = load_model(llama, dtype="float32")
    before = weights_of(loaded)
    file = llama / "model.safetensors"
    with file.open("r+b") as target:
        if how == "written over":
            target.write((other / "model.safetensors").read_bytes())
        else:
            target.truncate(4096)
    after = weights_of(loaded)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    if how == "written over":
        assert revision(llama) == revision(other) != loaded.spec.revision


def weights_of(model: LoadedModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.module.named_parameters()}
