"""Where models by name are kept, by the variables of huggingface_hub, and which of them are whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from microserve.services.local.hub.files import Needed, RemoteFile
from microserve.services.local.hub.name import HubError, parse_name
from microserve.services.local.hub.place import Place, commit_of, keep, kept, remove, usable, whole

COMMIT, OTHER = "a" * 40, "b" * 40
NAME = parse_name("org/tiny")
NEEDED = Needed(
    (RemoteFile("config.json", 2), RemoteFile("tokenizer.json", 2), RemoteFile("chat_template.jinja", 4)),
    (RemoteFile("model.safetensors", 6),),
)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "hub", tmp_path / "records")


def fill(place: Place, commit: str, *names: str) -> Path:
    snapshot = place.snapshot(NAME, commit)
    snapshot.mkdir(parents=True)
    lengths = {file.path: file.nbytes for file in NEEDED.files}
    for name in names or lengths:
        (snapshot / name).write_bytes(b"x" * lengths[name])
    return snapshot


@pytest.mark.parametrize(
    ("environment", "cache"),
    [
        ({"HOME": "{tmp}"}, ".cache/huggingface/hub"),
        ({"HOME": "/", "XDG_CACHE_HOME": "{tmp}/xdg"}, "xdg/huggingface/hub"),
        ({"HOME": "/", "XDG_CACHE_HOME": "{tmp}/xdg", "HF_HOME": "{tmp}/hf"}, "hf/hub"),
        ({"HOME": "/", "HF_HOME": "{tmp}/hf", "HF_HUB_CACHE": "{tmp}/own"}, "own"),
        ({"HOME": "/", "HF_HOME": "{tmp}/hf", "HUGGINGFACE_HUB_CACHE": "{tmp}/old"}, "old"),
    ],
)
def test_the_cache_is_that_of_huggingface_hub(
    environment: dict[str, str], cache: str, tmp_path: Path
) -> None:
    given = {name: value.format(tmp=tmp_path) for name, value in environment.items()}
    assert Place.of(given).cache == tmp_path / cache


def test_the_endpoint_the_token_and_whether_to_ask_are_of_the_environment(tmp_path: Path) -> None:
    base = {"HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf")}
    assert Place.of(base).endpoint == "https://huggingface.co"
    assert Place.of(base).token == "" and not Place.of(base).is_offline
    assert (
        Place.of({**base, "HF_ENDPOINT": "https://mirror.example/hf/"}).endpoint
        == "https://mirror.example/hf"
    )
    with pytest.raises(HubError, match="HF_ENDPOINT"):
        Place.of({**base, "HF_ENDPOINT": "mirror.example"})
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        assert Place.of({**base, name: "1"}).is_offline
        assert not Place.of({**base, name: "0"}).is_offline
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "token").write_text("hf_of_login\n")
    assert Place.of(base).token == "hf_of_login"
    assert Place.of({**base, "HF_TOKEN": "hf_given"}).token == "hf_given"
    assert Place.of({**base, "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}).token == ""
    (tmp_path / "elsewhere").write_text("hf_elsewhere")
    assert Place.of({**base, "HF_TOKEN_PATH": str(tmp_path / "elsewhere")}).token == "hf_elsewhere"


def test_what_was_kept_is_whole_as_long_as_every_file_has_its_length(place: Place) -> None:
    assert whole(place, NAME) is None and commit_of(place, NAME) is None
    snapshot = fill(place, COMMIT)
    assert whole(place, NAME) is None
    keep(place, NAME, COMMIT, NEEDED)
    assert whole(place, NAME) == snapshot == whole(place, parse_name(f"org/tiny@{COMMIT}"))
    for file in NEEDED.files:
        content = (snapshot / file.path).read_bytes()
        for damaged in (None, content[:-1], content + b"x"):
            (snapshot / file.path).unlink(missing_ok=True)
            if damaged is not None:
                (snapshot / file.path).write_bytes(damaged)
            assert whole(place, NAME) is None
            is_small = file in NEEDED.small
            assert (whole(place, NAME, weights=False) is None) == is_small
        (snapshot / file.path).write_bytes(content)
    assert whole(place, NAME) == snapshot


@pytest.mark.parametrize(
    "record", ["", "{}", "[]", '{"small": 1, "weights": {}}', '{"small": {}, "weights": {}}']
)
def test_a_record_that_says_nothing_counts_for_nothing(place: Place, record: str) -> None:
    fill(place, COMMIT)
    keep(place, NAME, COMMIT, NEEDED)
    place.record(NAME, COMMIT).write_text(record)
    assert whole(place, NAME) is None


@pytest.mark.parametrize("ref", ["", "main", "../../..", "a" * 39, "a" * 40 + "/.."])
def test_a_reference_is_a_commit_or_nothing(place: Place, ref: str) -> None:
    fill(place, COMMIT)
    keep(place, NAME, COMMIT, NEEDED)
    (place.repo(NAME) / "refs" / "main").write_text(ref)
    assert commit_of(place, NAME) is None and whole(place, NAME) is None and usable(place, NAME) is None


def test_what_others_have_fetched_is_usable_with_its_weights_and_tokenizer(place: Place) -> None:
    snapshot = fill(place, COMMIT, "config.json", "tokenizer.json")
    (place.repo(NAME) / "refs").mkdir()
    (place.repo(NAME) / "refs" / "main").write_text(COMMIT)
    assert usable(place, NAME) is None
    assert usable(place, NAME, weights=False) == snapshot
    index = snapshot / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}')
    (snapshot / "one.safetensors").write_bytes(b"x")
    assert usable(place, NAME) is None
    (snapshot / "two.safetensors").write_bytes(b"x")
    assert usable(place, NAME) == snapshot
    index.write_text("{")
    assert usable(place, NAME) is None
    (snapshot / "model.safetensors").write_bytes(b"x")
    assert usable(place, NAME) == snapshot
    (snapshot / "tokenizer.json").unlink()
    assert usable(place, NAME) is None


def test_all_of_the_cache_is_listed_and_a_model_can_be_removed(place: Place) -> None:
    assert list(kept(place)) == []
    fill(place, COMMIT)
    keep(place, NAME, COMMIT, NEEDED)
    fill(place, OTHER, "config.json")
    listed = {each.commit: each for each in kept(place)}
    assert set(listed) == {COMMIT, OTHER}
    assert (listed[COMMIT].repo, listed[COMMIT].revisions, listed[COMMIT].nbytes) == (
        "org/tiny",
        ("main",),
        14,
    )
    assert listed[COMMIT].is_whole and not listed[OTHER].is_whole
    assert remove(place, NAME) >= 14
    assert list(kept(place)) == [] and not list(place.records.glob("*.json"))
    with pytest.raises(HubError, match="org/tiny is not in"):
        remove(place, NAME)


def test_a_place_that_is_read_only_needs_no_record(place: Place) -> None:
    place.records.write_text("a file where the directory should be")
    fill(place, COMMIT)
    keep(place, NAME, COMMIT, NEEDED)
    assert whole(place, NAME) is None and usable(place, NAME) is not None
