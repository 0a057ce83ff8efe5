"""gpu.py on a CPU, in two processes: what it counts is right; its times say nothing about GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import gpu
import pytest
import torch
from gpu_parts import timing
from gpu_parts.engine import device_settings
from gpu_parts.plan import FULL, QUICK, TRIAL, Plan
from gpu_parts.receiver import Receiver
from gpu_parts.shape import LLAMA_8B, TINY
from gpu_parts.table import Goal, Row, head, line, summary
from torch.utils.flop_counter import FlopCounterMode

from microserve.kvcache.layout import KvLayout
from microserve.protocol.errors import InternalError
from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.services.engine.core.batch import Batch, Chunk, SampleSpec
from microserve.services.engine.model.model import load_model
from microserve.services.engine.model.runner import ModelRunner

BENCHMARKS = Path(__file__).parents[2] / "benchmarks" / "gpu"


def test_every_row_is_measured_between_two_processes_and_counts_right() -> None:
    """The tiny model, by hand: 3 layers of 491,520 weights, 7 norms of 256, 320 * 256 for the logits; KV of
    2 * 3 * 2 * 64 values of 2 bytes a token."""
    rows = list(gpu.measure(TRIAL, "cpu"))

    weights = (3 * 491_520 + 7 * 256 + 320 * 256) * 2
    assert [(row.what, row.amount, row.amount_unit) for row in rows] == [
        ("read", 1 << 20, "B"),
        ("copy, read and written", 2 << 20, "B"),
        ("matrix product of 64", 2 * 64 * 64 * 64, "FLOP"),
        ("transfer of 40 tokens: added to the prefill", 40 * 1536, "B"),
        ("transfer of 40 tokens: last layer's arrival", 40 * 1536, "B"),
        ("transfer of 150 tokens: added to the prefill", 150 * 1536, "B"),
        ("transfer of 150 tokens: last layer's arrival", 150 * 1536, "B"),
        # Behind 32 tokens, the first one and two steps to warm up: contexts of 35, 36, 37 and 38.
        ("decode step, batch 1, context 32", weights + 36 * 1536, "B"),
        ("decode step, batch 3, context 32", weights + 3 * 146 // 4 * 1536, "B"),
        ("prefill of 96 tokens", 283_115_520 + 14_303_232 + 163_840, "FLOP"),
        ("migration of 32 of 40 tokens", 32 * 1536, "B"),
    ]
    assert [str(row.goal) for row in rows if row.goal is not None] == [
        *("<= 2.0 %", "<= 1.00 layers") * 2,
        *(">= 75.0 %", ">= 65.0 %", ">= 60.0 %", ">= 20.0 x"),
    ]
    for row in rows[3:]:
        # Nothing takes no time, and only what is added to a prefill can be below nothing.
        assert row.share > (-1.0 if "added" in row.what else 0.0)


def test_what_is_counted_is_what_the_model_does(tmp_path: Path) -> None:
    model = load_model(TINY.write(tmp_path / "tiny"), dtype="bfloat16", load_format="random")
    read = [p for name, p in model.module.named_parameters() if "embed_tokens" not in name]
    assert TINY.read_weights_nbytes == sum(parameter.nbytes for parameter in read)

    layout = KvLayout("tiny", 3, 8, 16, 2, 64, "bfloat16")
    assert TINY.token_kv_nbytes * 16 * 8 == layout.data_nbytes
    runner = ModelRunner(model, torch.zeros(layout.data_nbytes, dtype=torch.uint8), 8, 16)
    spec = SampleSpec(SamplingParams(temperature=0.0), [1] * 96, [], frozenset())
    with FlopCounterMode(display=False) as counter:
        runner.execute(Batch([Chunk(0, [1] * 96, 0, list(range(8)), 0, spec)]))
    matrices = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    # Of attention the CPU computes what is masked as well: one multiplication in two is not needed.
    assert TINY.prefill_operations(96) - matrices == 3 * 4 * (4 * 64) * (96 * 97 // 2)


def test_the_large_model_has_the_dimensions_of_the_public_one() -> None:
    """8,030,261,248 weights, as its card says; 128 KiB of KV a token."""
    embedding_nbytes = 128_256 * 4_096 * 2
    assert LLAMA_8B.read_weights_nbytes + embedding_nbytes == 8_030_261_248 * 2
    assert LLAMA_8B.token_kv_nbytes == 128 << 10
    matrices, logits = 2 * 8192 * 32 * 218_103_808, 2 * 4096 * 128_256
    assert LLAMA_8B.prefill_operations(8192) == matrices + 32 * 4 * 4096 * 33_558_528 + logits
    assert LLAMA_8B.decode_nbytes(64 * 1024) == 15_009_849_344 + (8 << 30)


@pytest.mark.parametrize("plan", [FULL, QUICK])
def test_the_large_model_fits_its_memory_and_the_goals_are_covered(plan: Plan) -> None:
    kv_nbytes = (plan.num_blocks + plan.num_receiver_blocks) * 16 * LLAMA_8B.token_kv_nbytes
    assert 8_030_261_248 * 2 + kv_nbytes < 60 << 30
    assert set(plan.transfers) == {3000, 32000}
    assert plan.decodes == {1: 0.75, 64: 0.65}
    assert (plan.prefill_tokens, plan.migration_tokens) == (8192, 3000)


def test_the_command_says_that_a_cpu_measures_nothing() -> None:
    done = run("--device", "cpu", "--tiny")
    assert done.returncode == 0, done.stderr
    title, note, model, heading, *rows, last = done.stdout.splitlines()
    assert title.count(", ") == 5
    assert f"torch {torch.__version__}, triton " in title
    assert note == "on a CPU: this tries the code out and measures nothing about GPUs"
    assert model == "tiny, random weights, bf16"
    assert heading == head()
    assert len(rows) == 11
    assert [row.endswith(" -") for row in rows] == [False] * 3 + [True] * 8  # no goal is met or missed
    assert last == "nothing about GPUs was measured"


def test_the_large_model_is_refused_on_a_cpu() -> None:
    done = run("--device", "cpu")
    assert done.returncode == 2
    assert done.stderr.endswith("--device cpu needs --tiny\n")


def test_without_a_gpu_the_command_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 0
    assert capsys.readouterr().out == "gpu: no CUDA device: nothing is measured\n"


def test_an_error_of_the_engine_ends_it_with_code_1() -> None:
    """Whoever finds a device that the driver does not have: here there is none at all."""
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    script = "import sys, torch, gpu; gpu.timing.describe = str; torch.cuda.is_available = lambda: True"
    done = run("--device", "cuda:0", "--tiny", command=("-c", f"{script}; sys.exit(gpu.main(sys.argv[1:]))"))
    assert done.returncode == 1
    assert done.stderr.startswith("gpu: engine.device: ") or "cuda:0" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_receiver_that_cannot_start_is_reported() -> None:
    layout = KvLayout("tiny", 3, 8, 16, 2, 64, "bfloat16")
    with pytest.raises(InternalError, match="the receiver has ended, exit code 1"):
        Receiver(layout, [*device_settings("cpu"), "kvcache.grant_slots=none"], "cpu")


def test_a_goal_is_met_or_missed_on_the_row_and_in_the_summary() -> None:
    least, most = Goal(">=", 0.6, "%"), Goal("<=", 1.0, "layers")
    rows = [
        Row("rate", 5, "B", "1 B/s"),
        Row("fast", 15_009_849_344, "B", "1 ms", "bound 0.6 ms", 0.6, least),
        Row("slow", 2_000, "FLOP", "1 ms", "bound 0.5 ms", 0.599, least),
        Row("soon", 0, "B", "1 ms", "a layer 1 ms", 1.0, most),
        Row("late", 0, "B", "2 ms", "a layer 1 ms", 2.0, most),
        Row("never", 0, "B", "?", "a layer 1 ms", float("nan"), most),
    ]
    table = [line(row).split() for row in rows]
    assert [cells[-1] for cells in table[1:]] == ["met", "missed", "met", "missed", "missed"]
    assert table[0] == ["rate", "5", "B", "1", "B/s"]
    assert table[1][:3] == ["fast", "15", "GB"]
    assert summary(rows) == "2 of 5 goals met; missed: slow; late; never"
    assert summary(rows[:2]) == "1 of 1 goals met"


def test_the_driver_says_its_version(tmp_path: Path) -> None:
    file = tmp_path / "version"
    assert timing.driver_version(file) == "unknown"
    file.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n")
    assert timing.driver_version(file) == "580.65.06"


def run(
    *arguments: str, command: tuple[str, ...] = (str(BENCHMARKS / "gpu.py"),)
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    line = [sys.executable, *command, *arguments]
    return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=120, check=False)
