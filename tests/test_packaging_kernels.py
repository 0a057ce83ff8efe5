"""A wheel with compiled CPU kernels: its tag, and that it needs no compiler; one version of ziglang."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

from microserve.kernels.codec import build as codec
from microserve.kernels.cpu.build import main
from microserve.kernels.cpu.compiler import sources_digest
from tests.test_packaging import PACKAGES, ROOT


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this one, as far as a wheel is made of it."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / ".src", folder / ".src", symlinks=True)
    (folder / "tooling").mkdir()
    shutil.copy(ROOT / "tooling/wheel_hook.py", folder / "tooling")
    return folder


def wheel_of(checkout: Path) -> Path:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    wheels = checkout / "wheels"
    shutil.rmtree(wheels, ignore_errors=True)
    subprocess.run([*command, "--wheel-dir", str(wheels), str(checkout)], check=True, capture_output=True)
    (file,) = wheels.glob("*.whl")
    return file


def prebuilt_in(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return [name for name in archive.namelist() if name.endswith(".so")]


def test_a_wheel_is_for_all_platforms_until_the_kernels_are_compiled(checkout: Path) -> None:
    shutil.rmtree(checkout / "dist", ignore_errors=True)
    wheel = wheel_of(checkout)
    assert wheel.name.endswith("-py3-none-any.whl") and prebuilt_in(wheel) == []


def test_an_object_of_other_sources_stays_outside(checkout: Path) -> None:
    assert main(["--into", str(checkout / "dist/prebuilt")]) == 0
    source = checkout / "kernels/cpu/native/abi.h"
    before = source.read_text()
    source.write_text(before + "// another line\n")
    try:
        wheel = wheel_of(checkout)
    finally:
        source.write_text(before)
    assert wheel.name.endswith("-py3-none-any.whl") and prebuilt_in(wheel) == []


def test_a_wheel_with_compiled_kernels_needs_no_compiler(checkout: Path, tmp_path: Path) -> None:
    for build_into in (main, codec.main):
        assert build_into(["--into", str(checkout / "dist/prebuilt")]) == 0
    wheel = wheel_of(checkout)
    assert re.search(r"-py3-none-manylinux_2_\d+_\w+\.whl$", wheel.name)
    of_codec, held = sorted(prebuilt_in(wheel))
    assert of_codec.startswith(f"microserve/kernels/codec/native/prebuilt/kv-codec-{codec.SOURCE.digest}-")
    assert held.startswith(f"microserve/kernels/cpu/prebuilt/cpu-step-{sources_digest()}-")

    venv.create(tmp_path / "venv", symlinks=True)
    python = tmp_path / "venv/bin/python"
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps"]
    subprocess.run([*command, "--no-index", str(wheel)], check=True, capture_output=True)
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (site / "environment_of_the_tests.pth").write_text(sysconfig.get_path("purelib") + "\n")
    program = (
        "from microserve.kernels.cpu.build import build; from microserve.kernels.cpu.library import *\n"
        "from microserve.kernels.codec.native import native_codec; assert native_codec() is not None\n"
        "print(build().origin, choose_variant(library()))"
    )
    done = subprocess.run(
        [python, "-P", "-c", program],
        env={"PATH": str(tmp_path), "HOME": str(tmp_path), "MICROSERVE_KERNEL_CACHE": str(tmp_path / "none")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == str(site / held)
    assert not (tmp_path / "none").exists()


def test_there_is_one_version_of_ziglang() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (needed,) = extras["compiler"]
    version = needed.partition(";")[0]
    assert re.fullmatch(r"ziglang==[\d.]+", version)
    assert version in (ROOT / "deploy/Dockerfile").read_text()


def test_who_only_builds_needs_nothing_but_the_standard_library() -> None:
    """Wheels are made in an environment of hatchling alone."""
    program = f"import sys; sys.path.insert(0, {str(ROOT / '.src')!r}); import microserve.kernels.cpu.build"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
