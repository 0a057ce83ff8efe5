"""The house itself: one import root, a whole wheel, short files, nothing of anybody's machine."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("protocol", "kvcache", "kernels", "services", "gateway", "testing")

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
def wheel_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that users install, built here from this checkout."""
    directory = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(directory), str(ROOT)], check=True, capture_output=True)
    (file,) = directory.glob("microserve-*.whl")
    return file


@pytest.fixture
def wheel(wheel_file: Path) -> Iterator[zipfile.ZipFile]:
    with zipfile.ZipFile(wheel_file) as archive:
        yield archive


def test_the_wheel_holds_every_module_and_py_typed(wheel: zipfile.ZipFile) -> None:
    held = {name for name in wheel.namelist() if not name.split("/")[0].endswith(".dist-info")}
    sources = {path.relative_to(ROOT) for name in PACKAGES for path in (ROOT / name).rglob("*.py")}
    assert {f"microserve/{path}" for path in sources} <= held
    assert {name.split("/")[0] for name in held} == {"microserve"}
    assert {f"microserve/{name}/py.typed" for name in PACKAGES} <= held


def native_sources() -> set[str]:
    folders = (ROOT / "kernels/cpu/native", ROOT / "kernels/cuda")
    return {str(path.relative_to(ROOT)) for folder in folders for path in folder.rglob("*") if path.is_file()}


def test_the_wheel_holds_what_is_compiled_where_it_runs(wheel: zipfile.ZipFile) -> None:
    assert "kernels/cpu/native/door/api.cc" in native_sources()
    assert {f"microserve/{name}" for name in native_sources()} <= set(wheel.namelist())


def test_the_wheel_names_its_licence_and_command(wheel: zipfile.ZipFile) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    information = f"microserve-{version}.dist-info"
    assert b"Apache License" in wheel.read(f"{information}/licenses/LICENSE")
    assert b"microserve = microserve.services.command.main:main" in wheel.read(
        f"{information}/entry_points.txt"
    )


@pytest.fixture(scope="module")
def installed(wheel_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``bin`` of a fresh environment with the wheel installed. What it depends on is the environment of the
    tests, so nothing is downloaded; our own package of there is an editable one, which a ``.pth`` of another
    environment's folder does not bring along."""
    directory = tmp_path_factory.mktemp("installed")
    venv.create(directory, symlinks=True)
    (site,) = directory.glob("lib/python*/site-packages")
    command = [sys.executable, "-m", "pip", "--python", str(directory / "bin/python"), "install", "--quiet"]
    subprocess.run([*command, "--no-deps", "--no-index", str(wheel_file)], check=True, capture_output=True)
    (site / "environment_of_the_tests.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return directory / "bin"


def ask(installed: Path, *command: str, cwd: Path) -> str:
    outside = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    words = [str(installed / command[0]), *command[1:]]
    done = subprocess.run(words, cwd=cwd, env=outside, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_installed_wheel_runs_by_itself(installed: Path, tmp_path: Path) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert ask(installed, "microserve", "version", cwd=tmp_path) == f"microserve {version}\n"
    assert "gateway" in ask(installed, "microserve", "--help", cwd=tmp_path)
    look = "import microserve.gateway.app as a, microserve.services.router.authoring as b; "
    told = ask(installed, "python", "-c", f"{look}print(a.__file__, b.__file__)", cwd=tmp_path)
    assert all(Path(path).is_relative_to(installed.parent) for path in told.split()), told


def test_the_version_heads_the_changelog_below_what_is_unreleased() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert headings[0] == "[Unreleased]"
    assert re.fullmatch(rf"{re.escape(version)} - \d{{4}}-\d\d-\d\d", headings[1])


def test_the_source_archive_holds_everything_once(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (file,) = tmp_path.glob("microserve-*.tar.gz")
    with tarfile.open(file) as archive:
        members = [member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()]
    assert {f".src/microserve/{name}" for name in native_sources()} <= set(members)
    assert not [name for name in members if name.endswith(".so")]
    modules = [f"{Path(name).parent.name}/{Path(name).name}" for name in members if name.endswith(".py")]
    ours = [
        path for path in tracked() if path.suffix == ".py" and path.parts[len(ROOT.parts)] != "benchmarks"
    ]
    assert sorted(modules) == sorted(f"{path.parent.name}/{path.name}" for path in ours)


def test_no_file_is_too_long() -> None:
    """As ``make check`` and the commit hook ask; ``tests/tooling`` shows that the script can fail."""
    files = [str(path) for path in tracked() if path.suffix == ".py"]
    assert len(files) > 50
    done = subprocess.run(
        [sys.executable, ROOT / "tooling/file_length.py", *files], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_nobody_is_told_to_install_us_from_a_registry() -> None:
    """We are on none: a package of that name would be another's."""
    told = re.compile(r"pip install[^\n`]*['\" ]microserve(?:\[|['\"\s]|$)")
    assert told.search("pip install 'microserve[engine]'") and not told.search("pip install -e '.[engine]'")
    texts = {path: path.read_text(encoding="utf-8", errors="replace") for path in tracked()}
    found = [path for path, text in texts.items() if told.search(text) and path != Path(__file__)]
    assert found == []


def test_nothing_names_a_machine() -> None:
    found = []
    for path in tracked():
        text = path.read_text(encoding="utf-8", errors="replace")
        for pattern in (MACHINE_PATH, ADDRESS_OF_A_REGISTRY):
            if path != Path(__file__):
                found += [f"{path.relative_to(ROOT)}: {match[0]}" for match in pattern.finditer(text)]
    assert found == []
