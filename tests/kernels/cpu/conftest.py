"""What tests of builds share: compilers that are scripts, in a world without others."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.kernels.scripted_compiler import Compilers


@pytest.fixture
def compilers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compilers:
    """Neither a package with a compiler nor a prebuilt object, whatever this environment has."""
    monkeypatch.setattr("microserve.kernels.cpu.compiler.find_zig", lambda: None)
    monkeypatch.setattr("microserve.kernels.cpu.objects.PREBUILT", tmp_path / "prebuilt")
    return Compilers(tmp_path)
