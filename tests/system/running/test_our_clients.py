"""``microserve chat`` and ``microserve bench`` beside a mesh that ``microserve up`` runs: found by its
directory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.security.up_mesh import TIMEOUT_S, UpMesh, up_mesh

pytestmark = [pytest.mark.system, pytest.mark.timeout(400)]

BELIEVE = ("--max-lag-ms", "1e9", "--max-slip-ms", "1e9")


def test_both_find_the_mesh_of_their_directory(tiny_model: Path) -> None:
    with up_mesh(tiny_model, num_engines=1) as mesh:
        _chat(mesh)
        _bench(mesh)
        _trace(mesh)


def _chat(mesh: UpMesh) -> None:
    wishes = ("--temperature", "0", "--max-tokens", "12")
    answer = mesh.run("chat", "hello", "there", *wishes)
    assert (answer.returncode, answer.stderr) == (0, "")
    piped = subprocess.run(
        [sys.executable, "-P", "-m", "microserve.services", "chat", *wishes],
        cwd=mesh.cwd,
        input="hello there\n",
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert (piped.returncode, piped.stdout) == (0, answer.stdout)
    refused = mesh.run("chat", "hello", "--strategy", "nope")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr.startswith("Error: no strategy 'nope' (there are: auto, ")


def _bench(mesh: UpMesh) -> None:
    flags = ("-n", "12", "--rate", "50", "--concurrency", "4", "--output-len", "6", "--input-len", "40")
    for endpoint in ("chat", "completions"):
        done = mesh.run("bench", *flags, "--endpoint", endpoint, *BELIEVE, "--json", f"{endpoint}.json")
        assert done.returncode == 0, done.stdout + done.stderr
        assert "Successful requests:                     12\n" in done.stdout
        body = json.loads((mesh.cwd / f"{endpoint}.json").read_text())
        assert body["total_output_tokens"] == 72
        assert {row["engines"] for row in body["requests"]} <= {"e0", ""}
    assert body["total_input_tokens"] == 12 * 40, "ids are counted exactly"


def _trace(mesh: UpMesh) -> None:
    lines = [
        {"timestamp": 10 * at, "input_length": 30 + at, "output_length": 4, "hash_ids": [7]}
        for at in range(6)
    ]
    (mesh.cwd / "trace.jsonl").write_text("\n".join(map(json.dumps, lines)))
    flags = (
        "--trace",
        "trace.jsonl",
        "--endpoint",
        "completions",
        "--processes",
        "2",
        "--json",
        "trace.json",
    )
    done = mesh.run("bench", *flags, *BELIEVE)
    assert done.returncode == 0, done.stdout + done.stderr
    body = json.loads((mesh.cwd / "trace.json").read_text())
    assert body["total_input_tokens"] == sum(30 + at for at in range(6))
    assert body["total_output_tokens"] == 24
