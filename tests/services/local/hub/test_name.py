"""What ``--model`` may say, and what is said of a path that is here and is no model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microserve.protocol.errors import ConfigError
from microserve.services.local.hub.name import ModelName, local_model, parse_name, with_revision


@pytest.mark.parametrize(
    ("text", "repo", "revision"),
    [
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B", "main"),
        ("org_1/a.b-c_d@v1.0", "org_1/a.b-c_d", "v1.0"),
        ("org/name@refs/pr/3", "org/name", "refs/pr/3"),
        (f"org/name@{'0a' * 20}", "org/name", "0a" * 20),
    ],
)
def test_a_name_has_an_organisation_and_perhaps_a_revision(text: str, repo: str, revision: str) -> None:
    name = parse_name(text)
    assert (name.repo, name.revision) == (repo, revision)
    assert name.is_pinned == (len(revision) == 40)
    assert str(name) == text
    assert name.folder == "models--" + repo.replace("/", "--")


@pytest.mark.parametrize(
    "text",
    [
        *("", "name", "a/b/c", "/a/b", "./a", "../b", "a/..", "a/../b", "a/b/", "org/", "/name", "a//b"),
        *("org/na me", "org/name.git", "org/a--b", "o..g/name", "org/-name", "org/name.", "org/näme"),
        *("org/name@", "org/name@../x", "org/name@a//b", "org/name@/x", "org/name@x/", "org/name@a/../b"),
        *("org/name@x y", "org/name@v1@v2", "org/na\0me", "org/name\n", "http://org/name", "~/name"),
        *("x" * 97 + "/name", "org/name@" + "x" * 201),
    ],
)
def test_what_is_no_name_is_refused_in_a_sentence(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_name(text)
    assert caught.value.field == "model.path"
    assert "\n" not in str(caught.value)


@given(st.text(alphabet="ab./-_@~ \0\n", max_size=20))
def test_no_name_leads_out_of_the_cache(text: str) -> None:
    try:
        name = parse_name(text)
    except ConfigError:
        return
    cache = Path("/cache")
    for path in (cache / name.folder, cache / name.folder / "refs" / name.revision):
        assert ".." not in path.parts and path.is_relative_to(cache / name.folder)
    assert ModelName(name.repo, name.revision) == parse_name(str(name))


def test_a_revision_goes_with_a_name(tmp_path: Path) -> None:
    assert with_revision("org/name", "v1") == "org/name@v1"
    assert with_revision("org/name", None) == "org/name"
    assert with_revision(None, None) is None
    for model in (None, "org/name@v2", str(tmp_path)):
        with pytest.raises(ConfigError, match="--revision"):
            with_revision(model, "v1")


def test_a_model_s_directory_is_itself(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert local_model(str(tmp_path)) == tmp_path
    assert local_model(str(tmp_path / "absent")) is None
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    assert local_model(str(tokenizer)) == tokenizer  # which is all that a gateway reads
    assert local_model("org/name") is None


def test_a_directory_that_is_no_model_is_refused_with_what_it_is(tmp_path: Path) -> None:
    def told(path: Path) -> str:
        with pytest.raises(ConfigError) as caught:
            local_model(str(path))
        assert caught.value.field == "model.path"
        return str(caught.value)

    assert "it holds no config.json" in told(tmp_path)
    gguf = tmp_path / "tiny.Q4.gguf"
    gguf.write_bytes(b"GGUF")
    assert "it is a GGUF file" in told(gguf)
    assert "it holds GGUF files" in told(tmp_path)
    other = tmp_path / "model.safetensors"
    other.write_bytes(b"")
    assert "it is a file" in told(other)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    assert "it is an adapter of org/base" in told(adapter)
    (adapter / "config.json").write_text("{}")  # some trainers leave the base's there
    assert "merge it into its model first" in told(adapter)
    (adapter / "model.safetensors").write_bytes(b"")
    assert local_model(str(adapter)) == adapter
