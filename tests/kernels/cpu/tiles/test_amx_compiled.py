"""The AMX variant as compiled: its instructions one by one in a trap, and compilers that know none of them.

The trap sees what emulated intrinsics cannot: encodings, and stores that a compiler moves behind the tile
that reads them.
"""

from __future__ import annotations

import os
import platform
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from microserve.kernels.cpu.compiler import X86, compile_object, find_compilers
from microserve.kernels.cpu.library import Library, library
from microserve.kernels.cpu.objects import in_memory

pytestmark = pytest.mark.skipif(platform.machine() not in X86, reason="AMX is of x86")

ROOT = Path(__file__).parents[4]

TRAPPED = """
import sys
from dataclasses import replace
from pathlib import Path
from microserve.kernels.cpu.library import is_right
from tests.support.kernels.amx import compare, trapped_library
from tests.support.kernels.family import TILED, TinyModel

library, trap = trapped_library(Path(sys.argv[1]))
if not library.supports("amx"):
    print("this compiler does not know AMX")
    sys.exit()
assert is_right(library, "amx")
products = trap.amx_trap_count()
assert products > 0, "is_right() met no tile"
for head_dim, threads, block_size in ((32, 1, 16), (64, 2, 16), (64, 1, 5)):
    steps = [[(0, 37)], [(0, 1), (1, 18)], [(0, 1), (1, 1)]]
    compare(library, TinyModel(replace(TILED, head_dim=head_dim, block_size=block_size)), steps, threads)
compare(library, TinyModel(replace(TILED, head_dim=64)), [[(0, 260)], [(0, 1)]], 1)
assert trap.amx_trap_count() > products, "no step met a tile"
"""


@pytest.mark.timeout(900)  # compiles everything once
def test_compiled_instructions_give_the_bits(tmp_path: Path) -> None:
    """In a process of its own, whose SIGILL is the trap's."""
    if not library().supports("avx512"):
        pytest.skip("this CPU has no AVX512, whose lanes the variant uses")
    command = [sys.executable, "-c", TRAPPED, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if done.stdout.endswith("not know AMX\n"):
        pytest.skip(done.stdout)


@pytest.mark.timeout(900)
def test_a_compiler_without_the_flags_leaves_the_variant_out(tmp_path: Path) -> None:
    script = tmp_path / "old-c++"
    refuse = (
        'for flag; do case "$flag" in -mamx*|-mavx512bf16) '
        'echo "error: unrecognized $flag" >&2; exit 1;; esac; done'
    )
    first = find_compilers(os.environ)[0]
    script.write_text(f'#!/bin/sh\n{refuse}\nexec {" ".join(first.compile)} "$@" -O0\n')  # not to be run
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    old = replace(first, compile=(str(script),))
    (work := tmp_path / "work").mkdir()
    found = Library(in_memory(compile_object(old, work, 600.0), "old", "compiled here"))
    assert not found.supports("amx") and not found.supports("avx512bf16")
    assert found.supports("portable")
