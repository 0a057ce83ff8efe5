"""What tests of real processes share."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory small enough to load in a moment."""
    directory = tmp_path_factory.mktemp("model") / "tiny"
    program = Path(__file__).parents[1] / "tiny_model.py"
    subprocess.run([sys.executable, "-P", str(program), str(directory)], check=True, capture_output=True)
    return directory
