"""What real compilers make of the native step: the same bytes twice, the same bits by all of them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from microserve.kernels.cpu.build import build, cached_or_compiled
from microserve.kernels.cpu.compiler import OLDEST_GLIBC, find_compilers, sources_digest
from microserve.kernels.cpu.library import ELEMS, VARIANTS, Library
from microserve.kernels.cpu.objects import NativeObject, prebuilt
from microserve.kernels.kernel_cache import CACHE_VARIABLE
from tests.support.kernels.amx import streams
from tests.support.kernels.family import TILED, TinyModel
from tests.test_packaging import ROOT

LIMIT_S = 900.0
OURS_ALONE = {b"libc.so.6", b"libm.so.6", b"libpthread.so.0", b"ld-linux-x86-64.so.2"}
STEPS = [[(0, 130)], [(0, 1), (1, 17)], [(0, 1), (1, 1)], [(1, 30), (0, 1)]]
"""Rows of sequences, step by step."""


@pytest.fixture(scope="module")
def by_system() -> NativeObject:
    return build(limit_s=LIMIT_S)


@pytest.mark.heavy
def test_a_compiler_makes_the_same_bytes_wherever_it_runs(by_system: NativeObject, tmp_path: Path) -> None:
    """Two machines with one compiler are of one numerics class, which has the object's digest in it."""
    environment = {**os.environ, CACHE_VARIABLE: str(tmp_path / "another cache")}
    again = cached_or_compiled(find_compilers(environment), environment, print, LIMIT_S)
    assert (again.name, again.digest) == (by_system.name, by_system.digest)


@pytest.fixture(scope="module")
def by_zig(tmp_path_factory: pytest.TempPathFactory) -> NativeObject:
    """Compiled where there is no other compiler."""
    folder = tmp_path_factory.mktemp("zig")
    (version,) = re.findall(r'"(ziglang==[\d.]+)', (ROOT / "pyproject.toml").read_text())
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
    if subprocess.run([*command, version], check=False).returncode:
        pytest.skip(f"pip finds no {version}: is the package index reachable?")
    done = subprocess.run(
        [sys.executable, "-P", "-m", "microserve.kernels.cpu.build", "--ahead", "--into", folder / "built"],
        env={
            "PATH": str(folder / "none"),
            "HOME": str(folder),
            "PYTHONPATH": os.pathsep.join([*sys.path, str(folder)]),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0
    assert "compiles with ziglang" in done.stderr and "compiled in" in done.stderr, done.stderr
    found = prebuilt(sources_digest(), folder / "built")
    assert found is not None
    shutil.rmtree(folder / "ziglang")
    return found


@pytest.mark.heavy
def test_what_zig_makes_runs_on_old_systems_and_needs_nothing_but_the_c_library(by_zig: NativeObject) -> None:
    asked = {tuple(map(int, each.split(b"."))) for each in re.findall(rb"GLIBC_([\d.]+)", by_zig.content)}
    assert max(asked) <= tuple(map(int, OLDEST_GLIBC.split(".")))
    needed = set(re.findall(rb"\0([\w.+-]+\.so(?:\.\d+)*)(?=\0)", by_zig.content))
    assert needed and needed <= OURS_ALONE


@pytest.mark.heavy
def test_zig_s_object_has_the_same_variants_and_the_same_bits(
    by_system: NativeObject, by_zig: NativeObject
) -> None:
    mine, other = Library(by_system), Library(by_zig)
    for recipe, elem in ELEMS:
        usable = [name for name in VARIANTS if recipe in mine.recipes(name, elem)]
        assert [name for name in VARIANTS if recipe in other.recipes(name, elem)] == usable
        model = TinyModel(replace(TILED, biases="qkvo", head_norms=True), elem, recipe)
        sides = [streams(found, name, model, 2, 2) for found in (mine, other) for name in usable]
        for rows in STEPS:
            assert len({side.run(rows).tobytes() for side in sides}) == 1
        assert len({tuple(side.room.whole_pool()) for side in sides}) == 1


RUN = """
import os, sys
cores = sorted(os.sched_getaffinity(0))[:1]
os.sched_setaffinity(0, cores)
from microserve.kernels.cpu.library import library, choose_variant
from tests.support.kernels.family import TILED, TinyModel
from tests.support.kernels.family_step import Room, Streams
variant = choose_variant(library())
model = TinyModel(TILED, recipe=library().recipes(variant)[0])
streams = Streams(Room(model, variant, 2, bounds={"max_logits": 130}), 1)
for rows in (130, 1, 1):
    streams.run([(0, rows)])
print("ran on", len(os.sched_getaffinity(0)))
"""


def run(*before: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*before, sys.executable, "-P", "-c", RUN],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(ROOT)]), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_two_threads_share_one_core(by_system: NativeObject) -> None:
    done = run()
    assert (done.returncode, done.stdout) == (0, "ran on 1\n"), done.stderr


def test_where_files_may_not_be_executed_the_object_is_loaded_from_memory(
    by_system: NativeObject, tmp_path: Path
) -> None:
    """In a mount namespace of its own: a cache on a file system with ``noexec``."""
    (tmp_path / "cache").mkdir()
    shutil.copy(by_system.origin, tmp_path / by_system.name)
    mount = (
        'mount -t tmpfs -o noexec none "$0/cache" && cp "$0"/*.so "$0/cache" && '
        '! sh -c "cp /bin/true $0/cache && $0/cache/true" 2> "$0/refused" && exec "$@"'
    )
    before = ("unshare", "--map-root-user", "--mount", "sh", "-c", mount, str(tmp_path))
    if subprocess.run([*before[:3], "true"], capture_output=True, check=False).returncode:
        pytest.skip("this system lets nobody make mount namespaces")
    done = run(*before, PATH=os.environ["PATH"], **{CACHE_VARIABLE: str(tmp_path / "cache")})
    assert (done.returncode, done.stdout) == (0, "ran on 1\n"), done.stderr
    assert "Permission denied" in (tmp_path / "refused").read_text()
