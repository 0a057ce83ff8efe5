"""What a commit is held to: the hooks themselves, run on a repository with one fault for each of them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
HOOKS = ("ruff", "ruff-format", "mypy", "file-length")
FAULTS = {
    "ruff": ("protocol/ruff.py", "import os\n"),
    "ruff-format": ("tests/ruff-format.py", "value  =  1\n"),
    "mypy": ("protocol/mypy.py", 'value: int = "text"\n'),
    "file-length": ("tests/file-length.py", "# a line\n" * 401),
}


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A small checkout with our rules and our environment."""
    for name in ("pyproject.toml", ".pre-commit-config.yaml"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "tooling", tmp_path / "tooling")
    (tmp_path / ".venv").symlink_to(sys.prefix)
    (tmp_path / ".gitignore").write_text(".venv\n.*_cache/\n")
    (tmp_path / ".src/microserve").mkdir(parents=True)
    for name in ("protocol", "tests"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "sound.py").write_text("value: int = 1\n")
    (tmp_path / ".src/microserve/protocol").symlink_to("../../protocol")
    (tmp_path / ".src/tests").symlink_to("../tests")
    git(tmp_path, "init", "--quiet")
    return tmp_path


def git(repository: Path, *words: str) -> None:
    subprocess.run(["git", *words], cwd=repository, check=True, capture_output=True, env=environment())


def environment() -> dict[str, str]:
    """Ours without git's own variables (whoever tests in a hook has them) and without our import root."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("GIT_", "PYTHONPATH"))}


def complaints(repository: Path, cache: Path) -> dict[str, str]:
    """What each hook that fails a commit of everything prints."""
    git(repository, "add", "--all")
    done = subprocess.run(
        [BIN / "pre-commit", "run", "--color=never", "--verbose"],
        cwd=repository,
        capture_output=True,
        text=True,
        check=False,
        env={**environment(), "PRE_COMMIT_HOME": str(cache)},
    )
    assert "no files to check" not in done.stdout
    said = {}
    for part in done.stdout.split("- hook id: ")[1:]:
        hook, _, rest = part.partition("\n")
        if "- exit code: " in rest:
            said[hook] = rest
    assert bool(said) == bool(done.returncode), done.stdout + done.stderr
    return said


def test_what_is_sound_passes_every_hook(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert complaints(repository, tmp_path_factory.mktemp("pre-commit")) == {}


def test_each_hook_finds_its_fault_and_no_other_one(
    repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    for hook, (path, text) in FAULTS.items():
        (repository / path).write_text(text)
        assert hook in path
    said = complaints(repository, tmp_path_factory.mktemp("pre-commit"))
    named = {hook: {other for other in FAULTS if FAULTS[other][0] in text} for hook, text in said.items()}
    assert named == {hook: {hook} for hook in HOOKS}


def test_the_configuration_is_one_and_names_all_hooks() -> None:
    config = ROOT / ".pre-commit-config.yaml"
    subprocess.run([BIN / "pre-commit", "validate-config", config], check=True, capture_output=True)
    ids = [line.split()[-1] for line in config.read_text().splitlines() if line.strip().startswith("- id: ")]
    assert ids == list(HOOKS)
