"""The GPU benchmark without a GPU: every row runs on the CPU, and the command says what is missing."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "gpu_kernels.py"
    spec = importlib.util.spec_from_file_location("gpu_kernels_benchmark", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_every_row_has_arguments_that_fit(benchmark: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    setting = benchmark.Setting(torch.device("cpu"), num_tokens=40, rounds=1, places=2)
    benchmark.measure(setting, [(2, 32), (1, 64)], pool_blocks=16, ceiling_nbytes=1 << 20)
    rows = capsys.readouterr().out.splitlines()
    assert [row.split(",")[0].split()[0] for row in rows] == [
        *("copy", "scatter", "scatter", "scatter", "scatter", "scatter", "put", "quantise"),
        *("read", "decode", "decode"),
    ]


def test_without_a_gpu_the_command_says_so(
    benchmark: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert benchmark.main(["--quick"]) == 0
    assert capsys.readouterr().out == "gpu_kernels: no CUDA device: nothing is measured\n"
