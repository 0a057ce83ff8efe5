"""An engine's imports: what it never uses is not there, and whoever wants it all the same gets it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.engine.model.tiny_model import FAMILIES, make_tiny_model

pytestmark = pytest.mark.slow

HEAVY = ["torch._dynamo", "torch._inductor", "sympy", "torch.distributed.tensor"]
PRELUDE = f"""
import sys
from microserve.services.engine.lean_import import import_lean, without_compilers
def heavy():
    return [name for name in {HEAVY} if name in sys.modules]
"""


def said_by(program: str, *arguments: str) -> list[str]:
    """By a fresh interpreter: what was imported here before would hide what is imported there."""
    command = [sys.executable, "-c", PRELUDE + program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    "family", [name if name == "llama" else pytest.param(name, marks=pytest.mark.heavy) for name in FAMILIES]
)
def test_a_model_is_loaded_without_compilers_and_is_the_same(tmp_path: Path, family: str) -> None:
    model = str(make_tiny_model(tmp_path, family))
    make = """
from microserve.services.engine.model.model import load_model
def make():
    load_model(sys.argv[1], dtype="bfloat16", device="meta", load_format="random")
    print(load_model(sys.argv[1], dtype="bfloat16").spec.revision)
"""
    lean = said_by("import_lean()" + make + "with without_compilers(): make()\nprint(heavy())", model)
    usual = said_by(make + "make()", model)

    assert lean == [*usual, "[]"]


def test_what_a_placeholder_does_not_have_is_the_real_module_s() -> None:
    said = said_by(
        """
import torch
with without_compilers():
    assert torch._dynamo.disable(print) is print
    print(type(torch._dynamo.config).__name__, torch._dynamo is sys.modules["torch._dynamo"])
    print(torch._dynamo.disable(print) is print)
print("torch._inductor" in sys.modules)
"""
    )
    assert [line for line in said if "import.not_lean" not in line] == [
        "ConfigModuleInstance True",
        "False",
        "True",
    ]


def test_a_module_within_a_placeholder_is_imported_with_the_real_one_around_it() -> None:
    said = said_by(
        """
with without_compilers():
    import torch._dynamo.exc
    print(torch._dynamo.exc.Unsupported.__module__, torch._dynamo.__file__ is not None)
"""
    )
    assert said[-1] == "torch._dynamo.exc True"


def test_afterwards_everything_can_be_imported() -> None:
    said = said_by(
        """
import_lean()
print(heavy())
import torch, torch._dynamo, torch.distributed.tensor
print(torch._dynamo.__file__ is not None, torch.distributed.is_available())
"""
    )
    assert said == ["[]", "True True"]
