"""Finding, locking and placing the demo model; the conversion itself is shown by ``make up``."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest

from microserve.services.local.demo import model as demo_model
from microserve.services.local.demo.model import (
    MODEL_NAME,
    FetchFailed,
    Report,
    default_cache,
    fetch,
    find_gguf,
)

TIMEOUT_S = 20.0


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of the demo model's name that must not be imported."""
    folder = tmp_path / "site" / demo_model.MODULE
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(sys, "path", [str(folder.parent), *sys.path])
    return folder


def convert(gguf_file: Path, directory: Path, report: Report) -> None:
    (directory / "config.json").write_text(gguf_file.name)
    report("Converting", 1.0)


def test_cache_directory_follows_xdg() -> None:
    assert default_cache({"XDG_CACHE_HOME": "/var/cache"}) == Path("/var/cache/microserve")
    assert default_cache({}) == Path.home() / ".cache" / "microserve"


def test_the_gguf_is_found_without_importing_its_package(package: Path) -> None:
    assert find_gguf() == package / "model.gguf"
    assert demo_model.MODULE not in sys.modules


def test_made_once_then_found(package: Path, tmp_path: Path) -> None:
    steps: list[tuple[str, float | None]] = []
    made = fetch(tmp_path, lambda what, part: steps.append((what, part)), convert=convert)
    assert made == tmp_path / "models" / MODEL_NAME
    assert (made / "config.json").read_text() == "model.gguf"
    assert (made / "config.json").stat().st_mode & 0o777 == 0o644
    assert steps == [("Converting", 1.0)]

    def never(gguf_file: Path, directory: Path, report: Report) -> None:
        raise AssertionError("converted again")

    assert fetch(tmp_path, convert=never) == made


def test_a_failed_conversion_leaves_nothing_and_can_be_tried_again(package: Path, tmp_path: Path) -> None:
    def fail(gguf_file: Path, directory: Path, report: Report) -> None:
        (directory / "half").write_text("")
        raise FetchFailed("no memory")

    with pytest.raises(FetchFailed, match="no memory"):
        fetch(tmp_path, convert=fail)
    assert [path.name for path in (tmp_path / "models").iterdir()] == [f".{MODEL_NAME}.lock"]
    assert fetch(tmp_path, convert=convert).is_dir()


def test_leftovers_of_a_killed_process_are_removed(package: Path, tmp_path: Path) -> None:
    abandoned = tmp_path / "models" / f".{MODEL_NAME}.converting-abc"
    abandoned.mkdir(parents=True)
    (abandoned / "half").write_text("")
    fetch(tmp_path, convert=convert)
    assert not abandoned.exists()


def test_concurrent_callers_convert_once(package: Path, tmp_path: Path) -> None:
    conversions: list[int] = []
    begun, waiting = threading.Event(), threading.Event()

    def slow(gguf_file: Path, directory: Path, report: Report) -> None:
        conversions.append(1)
        begun.set()
        assert waiting.wait(TIMEOUT_S)
        convert(gguf_file, directory, report)

    def report(what: str, part: float | None) -> None:
        if "another process" in what:
            waiting.set()

    results: list[Path] = []
    first = threading.Thread(target=lambda: results.append(fetch(tmp_path, convert=slow)))
    second = threading.Thread(target=lambda: results.append(fetch(tmp_path, report, convert=slow)))
    first.start()
    assert begun.wait(TIMEOUT_S)
    second.start()
    for thread in (first, second):
        thread.join(TIMEOUT_S)
    assert len(conversions) == 1
    assert results == [tmp_path / "models" / MODEL_NAME] * 2


def test_progress_is_read_from_a_real_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "conversion.py"
    program.write_text(
        "import sys\n"
        "for p in (0, 50, 100):\n"
        "    sys.stderr.write(f'\\rLoading weights...:  {p:3}%|###  | {p}/100 [00:00<00:00]')\n"
        "sys.stderr.write('\\nsome warning\\n')\n"
        "sys.exit('no space left' if len(sys.argv[1]) > 200 else 0)\n"
    )
    monkeypatch.setattr(demo_model, "__file__", str(tmp_path / "model.py"))
    monkeypatch.setattr(demo_model, "CONVERTER_PACKAGES", ("sys",))
    steps: list[tuple[str, float | None]] = []
    demo_model.convert_gguf(Path("x"), tmp_path, lambda what, part: steps.append((what, part)))
    assert steps[0] == ("Loading the converter", None)
    assert steps[1:] == [("Loading weights", 0.0), ("Loading weights", 0.5), ("Loading weights", 1.0)]
    with pytest.raises(FetchFailed, match="no space left"):
        demo_model.convert_gguf(Path("x" * 201), tmp_path, lambda what, part: None)


def test_a_cache_that_cannot_be_written_is_said_with_the_way_out(package: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FetchFailed, match=r"(?s)file.*Not a directory.*XDG_CACHE_HOME=DIRECTORY"):
        fetch(tmp_path / "file", convert=convert)


def test_a_disk_without_room_is_said_before_anything_is_fetched(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_model, "NEEDED_MB", 1 << 40)
    with pytest.raises(FetchFailed, match=r"(?s)MB are needed, .* MB are free.*XDG_CACHE_HOME"):
        fetch(tmp_path, convert=convert)


def test_who_has_no_home_has_a_cache_all_the_same(tmp_path: Path) -> None:
    assert default_cache({"XDG_CACHE_HOME": "/c"}) == Path("/c/microserve")
    assert default_cache({"HOME": str(tmp_path)}) == tmp_path / ".cache/microserve"
    assert (
        default_cache({"XDG_CACHE_HOME": "relative", "HOME": str(tmp_path)}) == tmp_path / ".cache/microserve"
    )
    for environment in ({}, {"HOME": ""}, {"HOME": "/nowhere/at/all"}, {"HOME": "~"}):
        assert default_cache(environment).is_absolute()
        assert "nowhere" not in str(default_cache(environment))


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_model, "CONVERTER_PACKAGES", ("sys", "no_such_package"))
    with pytest.raises(FetchFailed, match=r"no_such_package: pip install '\.\[engine,demo\]'"):
        demo_model.convert_gguf(tmp_path / "x.gguf", tmp_path, lambda what, part: None)
