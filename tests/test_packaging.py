"""The house itself: one import root, a whole wheel, short files, nothing of anybody's machine."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("protocol", "kvcache", "kernels", "services", "gateway")

# Home directories and checkouts; /opt/microserve and the like are documented places, not machines.
MACHINE_PATH = re.compile(r"/(?:home|root|Users|work)/\w")
ADDRESS_OF_A_REGISTRY = re.compile(r"index-url\s*=|--index-url|find-links")


def tracked() -> list[Path]:
    """Files of the repository: what git tracks or would, else (an unpacked archive) all but hidden ones."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return [path for path in ROOT.rglob("*") if path.is_file() and not hidden(path)]
    paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    return [path for path in paths if path.is_file() and not path.is_symlink()]


def hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(ROOT).parts)


def test_the_import_root_links_to_the_folders() -> None:
    for name in PACKAGES:
        assert (ROOT / ".src" / "microserve" / name).resolve() == ROOT / name
        spec = importlib.util.find_spec(f"microserve.{name}")
        assert spec is not None
        locations = [Path(location).resolve() for location in spec.submodule_search_locations or ()]
        assert locations == [ROOT / name]


def test_our_kernels_never_hide_the_package_of_that_name() -> None:
    spec = importlib.util.find_spec("kernels")
    origins = [*(spec.submodule_search_locations or ()), spec.origin or ""] if spec else []
    assert not any(Path(origin).resolve().is_relative_to(ROOT) for origin in origins if origin)
    assert ROOT not in [Path(entry or ".").resolve() for entry in sys.path]
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    """The wheel that users install, built here from this checkout."""
    directory = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(directory), str(ROOT)], check=True, capture_output=True)
    (file,) = directory.glob("microserve-*.whl")
    with zipfile.ZipFile(file) as archive:
        yield archive


def test_the_wheel_holds_every_module_and_py_typed(wheel: zipfile.ZipFile) -> None:
    held = {name for name in wheel.namelist() if not name.split("/")[0].endswith(".dist-info")}
    sources = {path.relative_to(ROOT) for name in PACKAGES for path in (ROOT / name).rglob("*.py")}
    assert {f"microserve/{path}" for path in sources} <= held
    assert {name.split("/")[0] for name in held} == {"microserve"}
    assert "microserve/protocol/py.typed" in held


def test_the_wheel_names_its_licence_and_command(wheel: zipfile.ZipFile) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    information = f"microserve-{version}.dist-info"
    assert b"Apache License" in wheel.read(f"{information}/licenses/LICENSE")
    assert b"microserve = microserve.services.command.main:main" in wheel.read(
        f"{information}/entry_points.txt"
    )


def test_no_file_is_too_long() -> None:
    """As ``make check`` and the commit hook ask; ``tests/tooling`` shows that the script can fail."""
    files = [str(path) for path in tracked() if path.suffix == ".py"]
    assert len(files) > 50
    done = subprocess.run(
        [sys.executable, ROOT / "tooling/file_length.py", *files], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_nothing_names_a_machine() -> None:
    found = []
    for path in tracked():
        text = path.read_text(encoding="utf-8", errors="replace")
        for pattern in (MACHINE_PATH, ADDRESS_OF_A_REGISTRY):
            if path != Path(__file__):
                found += [f"{path.relative_to(ROOT)}: {match[0]}" for match in pattern.finditer(text)]
    assert found == []
