"""The engine's benchmarks in their quick form, on a tiny model: every figure is there, whatever it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

LONG = ("--tokens", "600")
"""A tiny model is done with a stream before the next one has begun."""
ROOM = Path(__file__).parents[2] / "benchmarks" / "engine"


def figures(name: str, model: Path, *flags: str) -> dict[str, Any]:
    command = [sys.executable, str(ROOM / f"{name}.py"), "--model", str(model), "--quick", "--json"]
    done = subprocess.run([*command, *flags], env=os.environ, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)  # type: ignore[no-any-return]


@pytest.mark.heavy
def test_steps_of_both_paths_beside_the_bound(tiny_model: Path) -> None:
    rows = figures("engine_step", tiny_model)["rows"]

    assert [row["step"] for row in rows] == ["decode 1 at 256", "decode 8 at 256", "prefill 512"]
    for row in rows:
        for side in ("native", "transformers"):
            median, least, most = row[f"{side}_ms"]
            assert 0 < least <= median <= most
        assert ("share" in row) is row["step"].startswith("decode")


@pytest.mark.heavy
def test_variants_beside_each_other(tiny_model: Path) -> None:
    rows = figures("engine_variants", tiny_model, "--variants", "portable,auto")["rows"]

    assert [row["variant"] for row in rows] == ["portable", "auto"] * 3
    assert all(row["cpu_ms"][0] > 0 and row["gflop_per_s"] > 0 for row in rows)
    assert [row["ratio"] for row in rows[::2]] == [[1.0, 1.0, 1.0]] * 3


@pytest.mark.heavy
def test_a_neighbour_of_both_paths(tiny_model: Path) -> None:
    rows = figures("engine_neighbour", tiny_model)["rows"]

    assert [row["path"] for row in rows] == ["native", "transformers"]
    assert all(row["slower"][0] > 0 for row in rows)


@pytest.mark.heavy
def test_constrained_beside_free(tiny_model: Path) -> None:
    told = figures("engine_guided", tiny_model)

    assert [row["streams"] for row in told["rows"]] == [1, 8]
    assert all(row["ratio"][0] > 0 for row in told["rows"])
    assert set(told["ttft_ms"]) == {"a bomb a second", "none"}


@pytest.mark.heavy
@pytest.mark.system
@pytest.mark.timeout(900)  # the peer alone makes 600 tokens in each of nine streams, twice
def test_a_mesh_beside_a_peer(tiny_model: Path) -> None:
    told = figures("engine_http", tiny_model, "--peers", "transformers", *LONG)

    assert told["absent"] == [] and set(told["versions"]) == {"microserve", "transformers"}
    assert [row["question"] for row in told["rows"]] == ["decode 1", "decode 8", "prefill 512"]
    assert all(row["ratio"]["transformers"][0] > 0 for row in told["rows"])


@pytest.mark.heavy
@pytest.mark.system
def test_two_engines_of_a_mesh_beside_two_bare_ones(tiny_model: Path) -> None:
    (row,) = figures("engine_mesh", tiny_model, *LONG)["rows"]

    assert row["streams_an_engine"] == 8
    assert row["mesh_tokens_per_s"][0] > 0 and row["bare_tokens_per_s"][0] > 0


@pytest.mark.heavy
def test_int8_beside_other_weights(tiny_model: Path) -> None:
    told = figures("int8_quality", tiny_model)

    assert told["num_tokens"] == 600 and set(told["loss"]) == {"bfloat16", "int8", "float32"}
    assert [(row["side"], row["against"]) for row in told["rows"]] == [
        ("int8", "bfloat16"),
        ("int8", "float32"),
        ("bfloat16", "float32"),
    ]
    assert all(0 < row["mean"] < row["worst"] and 0 < row["greedy"] <= 1 for row in told["rows"])


def test_codecs_beside_a_copy(tiny_model: Path) -> None:
    told = figures("../codec", tiny_model)

    rows = {row["name"]: row for row in told["rows"]}
    assert told["num_tokens"] == 48 and list(rows)[:3] == ["copy", "zstd of the rows", "none"]
    assert rows["lossless-rans"]["off_keys"] == 0 < rows["uniform-16-rans"]["off_keys"] < 0.2
    assert rows["uniform-16-rans"]["ratio"] > rows["lossless-rans"]["ratio"] > 0.9
    assert all(row["encode_mb_s"] > 0 and row["decode_mb_s"] > 0 for row in told["rows"])
