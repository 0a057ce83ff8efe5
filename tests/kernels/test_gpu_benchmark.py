"""The GPU benchmark without a GPU: every row runs on the CPU, and the command says what is missing."""

from __future__ import annotations

import gpu_kernels as benchmark
import pytest
import torch

from microserve.kernels.cuda_module import Launch


def test_every_row_has_arguments_that_fit(capsys: pytest.CaptureFixture[str]) -> None:
    setting = benchmark.Setting(torch.device("cpu"), num_tokens=40, rounds=1, places=2)
    benchmark.measure(setting, [(2, 32), (1, 64)], pool_blocks=16, ceiling_nbytes=1 << 20)
    rows = capsys.readouterr().out.splitlines()
    assert [row.split(",")[0].split()[0] for row in rows] == [
        *("copy", "scatter", "scatter", "scatter", "scatter", "scatter", "put", "read"),
        *("decode", "decode"),
    ]
    goals = [row.partition("ceiling")[2].strip().partition(" ")[2] for row in rows]
    assert goals == ["", "(>= 85.0 %)", *[""] * 6, "(>= 80.0 %)", "(>= 80.0 %)"]


def test_a_goal_is_met_from_its_bound_on(capsys: pytest.CaptureFixture[str]) -> None:
    benchmark.report("decode", 1e-6, 80, 100e6, benchmark.DECODE_GOAL)
    benchmark.report("decode", 1e-6, 79, 100e6, benchmark.DECODE_GOAL)
    benchmark.judge("launches", 3, benchmark.LAUNCHES_GOAL)
    benchmark.judge("launches", 4, benchmark.LAUNCHES_GOAL)
    rows = capsys.readouterr().out.splitlines()
    assert [row.split(" (")[0].split()[-1] for row in rows] == ["met", "missed", "met", "missed"]
    assert rows[3].endswith("4 launches  missed (<= 3 launches)")


def test_launches_of_a_round_are_counted_and_made(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    monkeypatch.setattr(Launch, "enqueue", lambda launch, device: made.append(launch.entry))
    launches = [Launch("block_put", entry, (1,), (1,), ()) for entry in ("a", "b")]
    device = torch.device("cpu")

    def run(_: int) -> None:
        for launch in launches:
            launch.enqueue(device)

    assert benchmark.count_launches(run) == 2
    assert made == ["a", "b"]


def test_the_shapes_reach_from_one_sequence_to_256_and_from_1k_to_32k() -> None:
    batches, contexts = zip(*benchmark.SHAPES, strict=True)
    assert {1, 256} <= set(batches) and {1024, 32768} <= set(contexts)
    assert {(a, b) for a in (1, 256) for b in (1024, 32768)} <= set(benchmark.SHAPES)


def test_without_a_gpu_the_command_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert benchmark.main(["--quick"]) == 0
    assert capsys.readouterr().out == "gpu_kernels: no CUDA device: nothing is measured\n"
