"""How the engine's benchmarks count: steady parts, ratios, and peers that are not there."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from engine_parts.serving import Stream, steady
from engine_parts.spread import Spread, differences, number, of_median, ratios
from engine_parts.steps import BLOCK_SIZE, decode, prefill
from engine_parts.vllm_server import Shape

PEERS = Path(__file__).parents[2] / "benchmarks" / "peers.sh"


def test_the_steady_part_is_that_in_which_all_streams_decode() -> None:
    early = Stream([1.0, 2.0, 3.0, 4.0, 5.0], 5)
    late = Stream([3.0, 4.0, 5.0, 6.0, 7.0], 5)

    found = steady([early, late])

    assert found.tokens_per_s == 4 / 2.0  # of 3 < t <= 5: two of either
    assert found.first_token_s == 2.0


def test_tokens_that_came_together_all_count() -> None:
    merged = steady([Stream([0.0, 1.0, 2.0], 6)])

    assert merged.tokens_an_event == 2.0
    assert merged.tokens_per_s == 2.0


def test_streams_that_never_decode_at_a_time_have_no_steady_part() -> None:
    with pytest.raises(RuntimeError, match="more tokens"):
        steady([Stream([0.0, 1.0], 2), Stream([1.0, 2.0], 2)])


def test_a_ratio_is_of_one_round() -> None:
    """Of a machine that was ten times slower in one of them."""
    assert ratios([10.0, 100.0, 12.0], [5.0, 50.0, 6.0]) == Spread(2.0, 2.0, 2.0)
    assert str(Spread.of([3.0, 1.0, 200.0])) == "3 (1-200)"
    assert number(1234.5) == "1234"


def test_sequences_of_a_step_share_no_block_and_a_prompt_is_whole() -> None:
    (batch,) = decode(32, 256).batches
    blocks = [block for chunk in batch.chunks for block in chunk.block_table]
    assert len(set(blocks)) == len(blocks) == 32 * 256 // BLOCK_SIZE

    chunks = [chunk for each in prefill(1100).batches for chunk in each.chunks]
    assert [(chunk.start, len(chunk.token_ids)) for chunk in chunks] == [(0, 512), (512, 512), (1024, 76)]
    assert [chunk.sample is not None for chunk in chunks] == [False, False, True]


@pytest.mark.heavy
def test_a_peer_that_does_not_install_is_a_line_and_no_failure(tmp_path: Path, tiny_model: Path) -> None:
    nowhere = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    environment = {**os.environ, "PYTHON": os.sys.executable, **nowhere}  # type: ignore[attr-defined]

    for name in ("openvino", "vllm"):
        command = [PEERS, name, tiny_model]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.startswith(f"peer {name}: not installed (ERROR: ")
        assert len(done.stdout.splitlines()) == 1

    assert subprocess.run([PEERS, "nobody"], capture_output=True, check=False).returncode == 2


def test_a_median_has_the_interval_of_its_ranks() -> None:
    assert of_median([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)
    assert of_median([float(value) for value in range(101)]) == Spread(50.0, 40.0, 60.0)
    assert differences([5.0, 9.0, 4.0], [4.0, 7.0, 1.0]) == Spread(2.0, 1.0, 3.0)


def test_both_sides_of_vllm_are_told_the_same() -> None:
    shape = Shape(max_num_batched_tokens=512, kv_mb=64)
    flags, settings = shape.flags(), shape.settings(Path("python"))

    assert flags[flags.index("--kv-cache-memory-bytes") + 1] == str(64 << 20)
    assert {"vllm.kv_cache_mb=64", "engine.max_num_batched_tokens=512"} < {*settings}
    for flag, setting in (
        ("--block-size", "kvcache.block_size"),
        ("--max-model-len", "engine.max_model_len"),
        ("--max-num-seqs", "engine.max_num_seqs"),
        ("--max-num-batched-tokens", "engine.max_num_batched_tokens"),
    ):
        assert f"{setting}={flags[flags.index(flag) + 1]}" in settings
