"""The native step with its AMX variant on CPUs without AMX, in two ways, and a comparison of whole steps.

Owns how both objects are built. Must not know what the steps are.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from microserve.kernels.cpu.build import cached_or_compiled
from microserve.kernels.cpu.compiler import find_compilers
from microserve.kernels.cpu.library import Library, library
from microserve.kernels.kernel_cache import CACHE_VARIABLE, cache_directory
from tests.support.kernels.family import TinyModel
from tests.support.kernels.family_step import Room, Streams

NATIVE = Path(__file__).parents[2] / "kernels" / "cpu" / "tiles"
BUILD_LIMIT_S = 600.0


def emulated_library() -> Library:
    """Tiles by ``amx_emulator.h``, whose text is in the object's name; its other vectors are AVX512's."""
    text = hashlib.sha256((NATIVE / "amx_emulator.h").read_bytes()).hexdigest()
    return _library('-DMS_EMULATE_AMX="amx_emulator.h"', f"-I{NATIVE}", told=text)


def trapped_library(directory: Path) -> tuple[Library, ctypes.CDLL]:
    """The instructions as the compiler wrote them, and what runs each of them in a signal handler.

    For a process that does nothing else. Built into ``directory`` is the handler alone.
    """
    found = _library()
    built = directory / "amx_trap.so"
    flags = ("-std=c++17", "-O3", "-fPIC", "-shared", "-ffp-contract=off", "-mavx512f", "-mfma")
    command = [*find_compilers(os.environ)[0].compile, *flags, str(NATIVE / "amx_trap.cc"), "-o", str(built)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    trap = ctypes.CDLL(str(built))
    assert trap.amx_trap_install() == 0
    return found, trap


def _library(*flags: str, told: str = "") -> Library:
    """By the first compiler with more flags, cached apart from what engines load."""
    if not library().supports("avx512"):
        pytest.skip("this CPU has no AVX512, whose lanes the variant uses")
    first = find_compilers(os.environ)[0]
    flags = (*flags, "-DMS_ASSUME_AMX")
    compiler = replace(
        first, compile=(*first.compile, *flags), version=f"{first.version} {first.compile} {flags} {told}"
    )
    cache = {CACHE_VARIABLE: str(cache_directory(os.environ) / "tests")}
    return Library(cached_or_compiled([compiler], {**os.environ, **cache}, print, BUILD_LIMIT_S))


def compare(
    found: Library, model: TinyModel, steps: Sequence[Sequence[tuple[int, int]]], threads: int
) -> None:
    """The same steps by both variants: logits of every row, and all of the pool at the end."""
    sequences = 1 + max(sequence for step in steps for sequence, _ in step)
    portable = streams(found, "portable", model, sequences)
    tiles = streams(found, "amx", model, sequences, threads)
    for step in steps:
        expected = portable.run(step)
        assert not np.isnan(expected).any()
        assert tiles.run(step).tobytes() == expected.tobytes()
    assert tiles.room.whole_pool() == portable.room.whole_pool()
    for each in (portable, tiles):
        each.room.close()


def streams(found: Library, variant: str, model: TinyModel, count: int, threads: int = 1) -> Streams:
    return Streams(Room(model, variant, threads, "mixed", {"max_logits": 300}, found), count)
