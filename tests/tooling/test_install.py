"""What ``make`` installs: which torch, only one, and what is said; by a real pip from indexes on disk."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from collections import namedtuple
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "tooling/install.py"
BACKEND = """
import zipfile

def build(directory, code):
    name = "thing-1-py3-none-any.whl"
    with zipfile.ZipFile(f"{directory}/{name}", "w") as wheel:
        wheel.writestr("thing.py" if code else "thing.pth", "")
        extras = "Provides-Extra: engine\\nRequires-Dist: torch; extra == 'engine'\\n"
        extras += "Provides-Extra: dev\\nRequires-Dist: triton==3.6.0; extra == 'dev'\\n"
        extras += "Provides-Extra: compiler\\nRequires-Dist: ziglang; extra == 'compiler'\\n"
        metadata = f"Metadata-Version: 2.1\\nName: thing\\nVersion: 1\\n{extras}"
        wheel.writestr("thing-1.dist-info/METADATA", metadata)
        wheel.writestr("thing-1.dist-info/WHEEL", "Wheel-Version: 1.0\\nTag: py3-none-any\\n")
        wheel.writestr("thing-1.dist-info/RECORD", "")
    return name

def build_wheel(directory, settings=None, metadata=None):
    return build(directory, True)

def build_editable(directory, settings=None, metadata=None):
    return build(directory, False)
"""


@pytest.fixture(scope="module")
def install() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tooling_install", PROGRAM)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


# --- which torch -------------------------------------------------------------------------------------


def test_the_cpu_build_is_asked_for_where_there_is_no_gpu(install: ModuleType) -> None:
    own = install.choose("", "", False, ["2.13.0", "2.13.0+cpu"], [])
    assert (own.requirement, own.extra_index, own.build) == ("torch==2.13.0+cpu", "", "cpu")
    official = install.choose("", "", False, ["2.13.0"], ["2.13.0", "2.13.0+cpu"])
    assert (official.requirement, official.build) == ("torch==2.13.0+cpu", "cpu")
    assert official.extra_index == install.CPU_INDEX


def test_without_a_cpu_build_the_other_is_taken_and_that_is_said(install: ModuleType) -> None:
    choice = install.choose("", "", False, ["2.13.0"], ["2.13.0"])
    assert (choice.requirement, choice.extra_index, choice.build) == ("torch==2.13.0", "", "cuda")
    assert "although this machine has no GPU" in choice.why and "TORCH=" in choice.why
    with pytest.raises(install.InstallFailed, match=r"finds no torch 2\.13\.0"):
        install.choose("", "", False, [], [])


def test_a_gpu_a_torch_that_is_there_and_the_user_s_word_come_first(install: ModuleType) -> None:
    assert install.choose("", "", True, [], []).requirement == "torch==2.13.0"
    assert install.choose("", "2.9.1", True, [], []).requirement == "torch==2.9.1"
    assert install.choose("torch==2.14.1", "2.9.1", True, [], []).requirement == "torch==2.14.1"


def test_a_gpu_is_a_device_and_not_a_driver_s_file(install: ModuleType, tmp_path: Path) -> None:
    assert not install.has_gpu(tmp_path)
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidiactl").touch()
    (tmp_path / "dev/dxg").touch()
    assert not install.has_gpu(tmp_path)
    (tmp_path / "dev/nvidia0").touch()
    assert install.has_gpu(tmp_path)


def test_a_disk_without_room_is_said_before_anything_is_fetched(
    install: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(install.shutil, "disk_usage", lambda _: usage(9, 9, 1_500_000_000))
    install.check_room(1_000, 400, tmp_path / "venv", tmp_path)
    with pytest.raises(install.InstallFailed, match=r"1\.6 GB are needed in .*, 1\.5 GB are free there"):
        install.check_room(1_200, 400, tmp_path / "venv", tmp_path)


def test_the_readme_has_the_figures(install: ModuleType) -> None:
    readme = (ROOT / "README.md").read_text()
    for download_mb, disk_mb in install.FOOTPRINT_MB.values():
        assert f"{download_mb / 1000:.1f} GB to download, {disk_mb / 1000:.1f} GB on disk" in readme
    download_mb, disk_mb = install.COMPILER_MB
    assert f"{download_mb / 1000:.1f} GB, {disk_mb / 1000:.1f} GB on disk" in " ".join(readme.split())
    assert re.search(rf"triton>={re.escape(TRITON)}", (ROOT / "pyproject.toml").read_text())


TRITON = "3.7.1"
"""What the CUDA build of torch 2.13.0 requires: with another one in ``dev`` another torch would come."""


# --- with a real pip ---------------------------------------------------------------------------------


def add(index: Path, name: str, version: str, requires: str = "") -> None:
    """A package in an index of files (PEP 503)."""
    folder = index / name
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}-{version}-py3-none-any.whl"
    information = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(file, "w") as wheel:
        wheel.writestr(f"{name}.py", f"version = {version!r}\n")
        needs = f"Requires-Dist: {requires}\n" if requires else ""
        wheel.writestr(
            f"{information}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}"
        )
        wheel.writestr(
            f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{information}/RECORD", "")
    links = [
        f'<a href="{each.name}#sha256={hashlib.sha256(each.read_bytes()).hexdigest()}">{each.name}</a>'
        for each in folder.glob("*.whl")
    ]
    (folder / "index.html").write_text(f"<!DOCTYPE html><html><body>{''.join(links)}</body></html>")


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """A folder with spaces in its name: a public index, PyTorch's own, and a project."""
    folder = tmp_path / "a path with spaces"
    add(folder / "public", "torch", "2.13.0", "triton==3.7.1")
    add(folder / "public", "torch", "2.12.0", "triton==3.6.0")
    for version in ("3.6.0", "3.7.1"):
        add(folder / "public", "triton", version)
    add(folder / "cpu", "torch", "2.13.0+cpu")
    project = folder / "project"
    project.mkdir()
    (project / "backend.py").write_text(BACKEND)
    (project / "pyproject.toml").write_text(
        "[build-system]\nrequires = []\nbuild-backend = 'backend'\nbackend-path = ['.']\n"
        "[project]\nname = 'thing'\nversion = '1'\n"
    )
    return folder


def run(world: Path, *words: str, cpu: str = "cpu", **environment: str) -> subprocess.CompletedProcess[str]:
    pip = {
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_INDEX_URL": (world / "public").as_uri(),
        "PIP_NO_CACHE_DIR": "1",
    }
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHON"))}
    command = [sys.executable, str(PROGRAM), "--venv", str(world / "venv"), "--gpu", "no"]
    command += ["--cpu-index", (world / cpu).as_uri(), "--project", str(world / "project"), *words]
    return subprocess.run(
        command, env={**kept, **pip, **environment}, cwd=world, capture_output=True, text=True, check=False
    )


def versions(world: Path) -> dict[str, str]:
    installed = (world / "venv").glob("lib/python*/site-packages/*.dist-info")
    return {name: version for name, _, version in (each.stem.partition("-") for each in installed)}


@pytest.mark.heavy
def test_one_torch_whatever_is_installed_later(world: Path) -> None:
    first = run(world, "--extras", "engine", PIP_USER="1", PIP_TARGET=str(world / "elsewhere"))
    assert first.returncode == 0, first.stdout + first.stderr
    assert "== torch: the CPU build, as this machine has no GPU" in first.stdout
    assert "GB to download" in first.stdout
    assert re.search(r"== installed: torch 2\.13\.0\+cpu, \d\.\d GB in .*venv, \d+ s", first.stdout)
    assert versions(world)["torch"] == "2.13.0+cpu"
    assert not (world / "elsewhere").exists()

    second = run(world, "--extras", "engine,dev")
    assert second.returncode == 0, second.stdout + second.stderr
    assert "2.13.0+cpu is installed and stays" in second.stdout
    assert (versions(world)["torch"], versions(world)["triton"]) == ("2.13.0+cpu", "3.6.0")


@pytest.mark.heavy
def test_what_cannot_be_had_with_that_torch_is_an_error_and_not_another_torch(world: Path) -> None:
    first = run(world, "--extras", "engine", cpu="not there")
    assert first.returncode == 0, first.stdout + first.stderr
    assert "a CUDA build although this machine has no GPU" in first.stdout
    assert (versions(world)["torch"], versions(world)["triton"]) == ("2.13.0", "3.7.1")

    second = run(world, "--extras", "engine,dev", cpu="not there")
    assert second.returncode == 1
    assert "Error: pip could not install all of it" in second.stderr
    assert (versions(world)["torch"], versions(world)["triton"]) == ("2.13.0", "3.7.1")


@pytest.mark.heavy
def test_an_environment_that_was_moved_is_made_anew_and_what_is_none_is_left(world: Path) -> None:
    assert run(world, "--extras", "engine").returncode == 0
    shutil.move(world / "venv", world / "old")
    shutil.move(world / "old", world / "venv")
    assert "made anew" not in run(world, "--extras", "engine").stdout  # it came back to its place
    shutil.copytree(world / "venv", world / "copy", symlinks=True)
    shutil.rmtree(world / "venv")
    shutil.move(world / "copy", world / "elsewhere")
    command = run(world, "--extras", "engine", "--venv", str(world / "elsewhere"))
    assert command.returncode == 0, command.stdout + command.stderr
    assert "was made elsewhere" in command.stdout
    (world / "mine").mkdir()
    (world / "mine/thesis.txt").touch()
    refused = run(world, "--extras", "engine", "--venv", str(world / "mine"))
    assert refused.returncode == 1
    assert "is no virtual environment; it is left as it is" in refused.stderr
    assert (world / "mine/thesis.txt").exists()


@pytest.mark.heavy
def test_no_index_at_all_is_said(world: Path) -> None:
    done = run(world, "--extras", "engine", cpu="not there", PIP_INDEX_URL=(world / "nowhere").as_uri())
    assert done.returncode == 1
    assert "Error: pip finds no torch 2.13.0" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.heavy
def test_ctrl_c_ends_it_with_a_word(world: Path) -> None:
    command = [sys.executable, str(PROGRAM), "--venv", str(world / "venv"), "--extras", "engine"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0
    )
    with process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()  # it asks for builds
        os.killpg(process.pid, signal.SIGINT)
        told = process.stderr.read()
    assert process.returncode == 130
    assert "stopped; the same command goes on from here" in told
    assert "Traceback" not in told


def test_a_compiler_counts_that_compiles_and_the_user_s_word(install: ModuleType, tmp_path: Path) -> None:
    assert not install.has_compiler({"PATH": str(tmp_path)})
    half = tmp_path / "c++"
    half.write_text("#!/bin/sh\necho 'fatal error: atomic: No such file or directory' >&2; exit 1\n")
    half.chmod(0o755)
    assert not install.has_compiler({"PATH": str(tmp_path)})
    assert install.has_compiler({"PATH": str(tmp_path), "CXX": "mine"})
    whole = tmp_path / "g++"
    whole.write_text('#!/bin/sh\nread -r line; case "$line" in *atomic*) exit 0;; esac; exit 1\n')
    whole.chmod(0o755)
    assert install.has_compiler({"PATH": str(tmp_path)})


@pytest.mark.heavy
def test_where_there_is_no_compiler_the_package_of_one_is_installed(world: Path) -> None:
    add(world / "public", "ziglang", "0.17.1")
    (world / "bin").mkdir()
    with_one = run(world, "--extras", "engine", CXX="mine")
    assert with_one.returncode == 0, with_one.stdout + with_one.stderr
    assert "ziglang" not in with_one.stdout and "ziglang" not in versions(world)
    without = run(world, "--extras", "engine", CXX="", PATH=str(world / "bin"))
    assert without.returncode == 0, without.stdout + without.stderr
    assert "no C++ compiler that works is here: the package ziglang" in without.stdout
    assert "about 0.1 GB to download, 0.4 GB on disk" in without.stdout
    assert versions(world)["ziglang"] == "0.17.1"


def test_two_at_a_time_wait_for_each_other(install: ModuleType, tmp_path: Path) -> None:
    program = (
        "import importlib.util as u, sys; from pathlib import Path\n"
        f"spec = u.spec_from_file_location('install', {str(PROGRAM)!r}); module = u.module_from_spec(spec)\n"
        "sys.modules['install'] = module; spec.loader.exec_module(module)\n"
        "with module.alone(Path(sys.argv[1])): print('alone', flush=True)\n"
    )
    with install.alone(tmp_path / "venv"):
        command = [sys.executable, "-c", program, str(tmp_path / "venv")]
        second = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert second.stdout is not None
        assert "waiting for it" in second.stdout.readline()
    assert second.communicate()[0] == "alone\n"


def test_a_folder_that_cannot_be_written_is_said(world: Path) -> None:
    (world / "file").touch()
    done = run(world, "--extras", "engine", "--venv", str(world / "file/venv"))
    assert done.returncode == 1
    assert "Error: " in done.stderr and "Traceback" not in done.stderr
