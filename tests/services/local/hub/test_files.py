"""Which files of a repository are fetched, and which repositories are refused by their list of files."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microserve.services.local.hub.files import (
    Listing,
    Needed,
    RemoteFile,
    needed_of,
    require_config,
    wants_index,
)
from microserve.services.local.hub.name import HubError

SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
INDEX = {"weight_map": {"a": SHARDS[1], "b": SHARDS[0], "c": SHARDS[0]}}


def listing(*names: str) -> Listing:
    return Listing("c" * 40, {name: RemoteFile(name, 10 + len(name)) for name in names})


def paths(needed: Needed) -> list[str]:
    return [file.path for file in needed.files]


def test_one_set_of_safetensors_and_what_text_is_made_with() -> None:
    found = needed_of(
        "org/name",
        listing(
            *(".gitattributes", "LICENSE", "README.md", "config.json", "generation_config.json"),
            *("model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
            *("pytorch_model.bin", "tf_model.h5", "name.Q4_K_M.gguf", "original/consolidated.00.pth"),
            *("onnx/model.onnx", "consolidated.safetensors", "model.fp16.safetensors", "tokenizer.model"),
            *("modeling_name.py", "1_Pooling/config.json"),
        ),
        None,
    )
    assert paths(found) == [
        *("config.json", "generation_config.json", "tokenizer_config.json", "chat_template.jinja"),
        *("tokenizer.json", "model.safetensors"),
    ]
    assert found.weights_nbytes == 10 + len("model.safetensors")


def test_the_shards_of_the_index_and_no_others() -> None:
    there = listing("config.json", "tokenizer.json", "model.safetensors.index.json", *SHARDS, "x.safetensors")
    assert wants_index(there.files)
    found = needed_of("org/name", there, INDEX)
    assert paths(found) == ["config.json", "tokenizer.json", "model.safetensors.index.json", *SHARDS]


def test_a_whole_file_goes_before_an_index_as_transformers_has_it() -> None:
    there = listing("config.json", "tokenizer.json", "model.safetensors.index.json", "model.safetensors")
    assert not wants_index(there.files)
    assert paths(needed_of("org/name", there, None))[-1] == "model.safetensors"


NAMES = ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors", *SHARDS]
NAMES += ["model.safetensors.index.json", "pytorch_model.bin", "a.gguf", "original/model.safetensors", "x.py"]


@given(names=st.sets(st.sampled_from(NAMES)), shards=st.lists(st.sampled_from([*SHARDS, "x.bin"])))
def test_of_any_repository_one_whole_set_of_weights_or_a_refusal(names: set[str], shards: list[str]) -> None:
    there = listing(*names)
    index = {"weight_map": {str(n): shard for n, shard in enumerate(shards)}}
    try:
        require_config("org/name", there.files)
        found = needed_of("org/name", there, index if wants_index(there.files) else None)
    except HubError as error:
        assert "\n" not in str(error)
        return
    taken = paths(found)
    assert set(taken) <= names and len(set(taken)) == len(taken)
    assert {"config.json", "tokenizer.json"} <= set(taken)
    weights = [file.path for file in found.weights]
    assert weights == (["model.safetensors"] if "model.safetensors" in names else sorted(set(shards)))
    assert all(name.endswith(".safetensors") and "/" not in name for name in weights) and weights
    assert not {"pytorch_model.bin", "a.gguf", "x.py"} & set(taken)


@pytest.mark.parametrize(
    ("names", "index", "told"),
    [
        (["pytorch_model.bin", "tokenizer.json"], None, "pickles alone"),
        (["tokenizer.json"], None, "holds no model.safetensors"),
        (["model.safetensors", "tokenizer.model"], None, "has no tokenizer.json"),
        (["tokenizer.json", SHARDS[0]], INDEX, f"lacks {SHARDS[1]}"),
        (["tokenizer.json"], {}, "names no files"),
        (["tokenizer.json"], {"weight_map": [1]}, "names no files"),
        (
            ["tokenizer.json", "a/b.safetensors"],
            {"weight_map": {"w": "a/b.safetensors"}},
            "no file of weights",
        ),
        (["tokenizer.json", "x.bin"], {"weight_map": {"w": "x.bin"}}, "no file of weights"),
    ],
)
def test_what_cannot_be_served_is_refused(names: list[str], index: Any, told: str) -> None:
    with pytest.raises(HubError, match=told):
        needed_of("org/name", listing("config.json", *names), index)


def test_a_small_file_that_is_huge_is_refused() -> None:
    there = listing("config.json", "tokenizer.json", "model.safetensors")
    files = {**there.files, "tokenizer.json": RemoteFile("tokenizer.json", 1 << 40)}
    with pytest.raises(HubError, match=r"tokenizer\.json of org/name has"):
        needed_of("org/name", Listing(there.commit, files), None)


@pytest.mark.parametrize(
    ("name", "told"),
    [("adapter_config.json", "adapter"), ("a.gguf", "GGUF"), ("model.safetensors", "no config.json")],
)
def test_a_repository_of_another_kind_is_told_what_it_is(name: str, told: str) -> None:
    with pytest.raises(HubError, match=told):
        require_config("org/name", listing(name).files)
    require_config("org/name", listing(name, "config.json").files)
