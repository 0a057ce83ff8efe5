"""Sources on disk: a file, or a folder with an ``__init__.py``. Reads, runs nothing."""

from __future__ import annotations

from importlib.util import decode_source
from pathlib import Path

from microserve.protocol.errors import ConfigError
from microserve.protocol.strategy_source import MAX_FILES, TOP, packed


def read_files(path: Path) -> dict[str, str]:
    """The text of each file by its name in the package; of a single file, as ``__init__.py``. Tests that lie
    in a package (``test_*.py``, ``conftest.py``) are no part of it. Raises :class:`ConfigError`."""
    if not path.is_dir():
        if path.suffix != ".py":
            raise ConfigError(f"{path}: not a Python file, nor a folder with an {TOP}", field="source")
        return {TOP: _text(path)}
    if not (path / TOP).is_file():
        raise ConfigError(f"{path}: a folder without {TOP}", field="source")
    found = [each for each in sorted(path.rglob("*.py")) if _is_part(each.relative_to(path))]
    if len(found) > MAX_FILES:
        raise ConfigError(f"{path}: {len(found)} files, at most {MAX_FILES}", field="source")
    return {each.relative_to(path).as_posix(): _text(each) for each in found}


def read_source(path: Path) -> str:
    """The same as one text, as it is published. Raises :class:`ConfigError`."""
    return packed(read_files(path))


def _is_part(path: Path) -> bool:
    is_hidden = any(part.startswith((".", "__pycache__")) for part in path.parts)
    return not (is_hidden or path.name.startswith("test_") or path.name == "conftest.py")


def _text(path: Path) -> str:
    try:
        return decode_source(path.read_bytes())
    except (OSError, UnicodeDecodeError, SyntaxError) as error:
        raise ConfigError(f"{path}: {type(error).__name__}: {error}", field="source") from None
