"""What an adapter's name stands for, and which directories are none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from microserve.protocol.errors import ConfigError
from microserve.services.engine.vllm.adapters import FoundAdapter, arguments_for, read_adapters
from tests.support.engine.model.tiny_adapter import make_tiny_adapter
from tests.support.engine.model.tiny_model import make_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


def read(directory: Path, model: Path) -> FoundAdapter:
    (found,) = read_adapters({"sql": str(directory)}, model)
    return found


def edit(directory: Path, **changes: object) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_revision_is_of_config_and_weights(model: Path, tmp_path: Path) -> None:
    one = make_tiny_adapter(tmp_path / "one", model, seed=1)
    same = make_tiny_adapter(tmp_path / "same", model, seed=1)
    other = make_tiny_adapter(tmp_path / "other", model, seed=2)
    revision = read(one, model).adapter.revision
    assert len(revision) == 32 and read(same, model).adapter.revision == revision
    assert read(other, model).adapter.revision != revision
    edit(same, base_model_name_or_path="/somewhere/else", inference_mode=False)
    assert read(same, model).adapter.revision == revision, "what changes nothing does not count"
    edit(same, lora_alpha=3)
    assert read(same, model).adapter.revision != revision


def test_vllm_is_told_of_as_much_room_as_they_need(model: Path, tmp_path: Path) -> None:
    named = {
        f"r{rank}": str(make_tiny_adapter(tmp_path / f"{rank}", model, rank=rank)) for rank in (1, 4, 12)
    }
    found = read_adapters(named, model)
    room = {"enable_lora": True, "max_cpu_loras": 3, "max_lora_rank": 16}
    assert arguments_for(found, {}) == {**room, "max_loras": 3}
    assert arguments_for(found, {"max_loras": 1}) == {**room, "max_loras": 1}
    assert arguments_for(found, {"max_loras": 5}) == {**room, "max_loras": 5, "max_cpu_loras": 5}
    assert arguments_for([], {"max_loras": 5}) == {}


def _of_another_model(directory: Path) -> None:
    other = make_tiny_model(directory.parent / "other", hidden_size=36)
    make_tiny_adapter(directory, other)


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda path: (path / "adapter_config.json").unlink(), "adapter_config.json: No such file"),
    "no JSON": (lambda path: (path / "adapter_config.json").write_text("{"), "is no JSON"),
    "no object": (lambda path: (path / "adapter_config.json").write_text("[]"), "must be 'LORA', is None"),
    "another kind": (lambda path: edit(path, peft_type="LOHA"), "must be 'LORA', is 'LOHA'"),
    "no rank": (lambda path: edit(path, r=None), "r in adapter_config.json must be 1 to 512"),
    "a rank of 513": (lambda path: edit(path, rank_pattern={"q_proj": 513}), "must be 1 to 512"),
    "no weights": (lambda path: (path / "adapter_model.safetensors").unlink(), "has no adapter_model"),
    "no safetensors": (
        lambda path: (path / "adapter_model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{"),
        "is no file of safetensors",
    ),
    "another model's": (_of_another_model, "_proj has in_features 36, the model's has 72"),
}


@pytest.mark.parametrize("how", SPOILT)
def test_what_is_no_adapter_of_the_model_is_refused_by_name(model: Path, tmp_path: Path, how: str) -> None:
    directory = make_tiny_adapter(tmp_path / "adapter", model)
    spoil, told = SPOILT[how]
    spoil(directory)
    with pytest.raises(ConfigError) as caught:
        read(directory, model)
    assert caught.value.field == "model.adapters.sql" and caught.value.detail.startswith("model.adapters.sql")
    assert told in caught.value.detail
