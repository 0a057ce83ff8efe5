"""A library of measured profiles: what is written is read, and what is wrong in a file is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from microserve.kvcache.codec import library as files
from microserve.kvcache.codec.library import BUILT_IN, Cost, Library, Measured, Quality
from microserve.kvcache.codec.profile import NONE, Levels, Profile
from microserve.protocol.errors import ConfigError
from microserve.protocol.messages.kv.geometry import Geometry

pytestmark = pytest.mark.quick

GEOMETRY = Geometry("bfloat16", "rows", 16, num_layers=2, num_kv_heads=3, head_dim=64)
MIXED = Profile(
    "mixhq-h80-12/10-6/4-rans",
    "hadamard",
    "mixed_head",
    Levels(12, 6),
    Levels(10, 4),
    low_ratio=0.8,
    coder="rans",
)
FULL = Library(
    model="demo",
    revision="r1",
    dtype="bfloat16",
    geometry=GEOMETRY,
    workload="conversation 12ab",
    machine="2 cores",
    made="2026-11-30 microserve profile demo",
    head_scores=[[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]],
    entries=[
        Measured(MIXED, 8.5, Cost(1e-4, 2e-9), Cost(5e-5, 1e-9), Quality(0.98, 0.96, 1.0, 0.01, 0.05, 0.97)),
        Measured(Profile("lossless-zstd", coder="zstd"), 1.3, Cost(0.0, 4e-9), Cost(0.0, 1e-9)),
    ],
)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "demo.json"
    files.save(FULL, str(path))
    assert files.load(str(path)) == FULL
    assert json.loads(path.read_text())["geometry"]["num_kv_heads"] == 3  # by names: people read it
    assert list(tmp_path.iterdir()) == [path]


def test_profiles_are_found_by_name() -> None:
    assert FULL.profile(MIXED.name) == MIXED and MIXED.is_lossy
    assert FULL.profile("none") is NONE and not NONE.is_lossy
    assert FULL.profile("other") is None
    assert not any(each.profile.is_lossy for each in BUILT_IN.entries)


def test_what_an_engine_knows_without_a_file_is_a_library() -> None:
    assert files.decode(files.encode(BUILT_IN)) == BUILT_IN


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 2}, "version 2, expected 1"),
        (
            {"entries": [{"profile": {"name": "a"}, "ratio": 0, "encode": {}, "decode": {}}]},
            "entries[0]: ratio 0",
        ),
        (
            {"entries": [{"profile": {"name": "a"}, "ratio": 2, "encode": {"a_s": -1}, "decode": {}}]},
            "entries[0]: encode.a_s -1",
        ),
        ({"entries": [{"profile": {"name": ""}, "ratio": 2, "encode": {}, "decode": {}}]}, "without a name"),
        (
            {
                "entries": [
                    {"profile": {"name": "none", "coder": "zstd"}, "ratio": 2, "encode": {}, "decode": {}}
                ]
            },
            "the name none",
        ),
        (
            {"entries": [{"profile": {"name": "a"}, "ratio": 2, "encode": {}, "decode": {}}] * 2},
            "entries[1]: a second profile a",
        ),
        (
            {
                "entries": [
                    {
                        "profile": {"name": "a"},
                        "ratio": 2,
                        "encode": {},
                        "decode": {},
                        "quality": {"score": 0.5, "score_low": 0.6, "score_high": 0.7},
                    }
                ]
            },
            "quality.score is outside",
        ),
        (
            {"entries": [{"profile": {"name": "a"}, "ratio": "2", "encode": {}, "decode": {}}]},
            "$.entries[0].ratio",
        ),
        ({"geometry": {"dtipe": "x"}}, "geometry.dtipe"),
        ({"head_scores": [[1.0], [1.0, 2.0]]}, "head_scores"),
        (
            {
                "head_scores": [[1.0]],
                "geometry": {"dtype": "bfloat16", "order": "rows", "num_layers": 2, "num_kv_heads": 1},
            },
            "head_scores: 1 layers of 1 heads, the geometry has 2 of 1",
        ),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path: Path, change: dict[str, object], said: str) -> None:
    path = tmp_path / "demo.json"
    path.write_text(json.dumps(change))
    with pytest.raises(ConfigError) as caught:
        files.load(str(path))
    assert str(path) in caught.value.detail and said in caught.value.detail
    assert caught.value.field == "engine.codec_library"


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b"\xff", b"[" * 100_000, b'{"entries": [null]}'])
def test_what_is_no_library_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "demo.json").write_bytes(data)
    with pytest.raises(ConfigError):
        files.load(str(tmp_path / "demo.json"))


def test_a_file_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"No such file"):
        files.load(str(tmp_path / "no.json"))


def test_what_could_not_be_loaded_is_not_saved(tmp_path: Path) -> None:
    bad = Library(entries=[Measured(MIXED, float("nan"), Cost(), Cost())])
    with pytest.raises(ConfigError, match="ratio"):
        files.save(bad, str(tmp_path / "demo.json"))
    assert not list(tmp_path.iterdir())


def test_a_cost_is_of_payloads_and_of_bytes() -> None:
    assert Cost(0.5, 0.25).seconds(8, num_payloads=3) == 3.5


@pytest.mark.parametrize("name", ["x" * 97, "with\nline", "größe", "auto"])
def test_a_name_fits_where_profiles_are_named(name: str) -> None:
    """On the wire, in a line of the log, and beside ``auto``."""
    entry = Measured(Profile(name, coder="zstd"), 1.3, Cost(), Cost())
    with pytest.raises(ConfigError, match=r"entries\[0\]: the name"):
        files.encode(Library(entries=[entry]))
