"""No Python file is longer than 400 lines, and no folder holds more than a dozen of them: ``make check``, the
commit hook and a test ask this one script.

    python tooling/file_length.py [FILE ...]     without files: all that git knows or would add

Prints the files that are too long, of those that are named, and the folders that are too full, of all that
git knows; exit code 1 if there is one. A folder's map (``__init__.py``) and what its tests share
(``conftest.py``) are not counted. Knows the limits and nothing of what is in a file.
"""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

MAX_LINES = 400
MAX_FILES = 12
FULLER = {
    "services/engine/vllm/front": (13, "one state machine, whose files all change one request's state"),
    "tests/engine_conformance": (13, "a list of promises, read from its first to its last: a file for each"),
    "tests/services/engine/vllm/connector": (14, "one vLLM is started for all of them"),
}
"""Folders that may hold more, how many, and why cutting them would be worse."""


def too_long(paths: Iterable[Path]) -> dict[Path, int]:
    """Lines of each file that has more than :data:`MAX_LINES`; links count where they lead."""
    lengths = {path: len(path.read_bytes().splitlines()) for path in paths if not path.is_symlink()}
    return {path: lines for path, lines in lengths.items() if lines > MAX_LINES}


def too_full(paths: Iterable[Path]) -> dict[Path, int]:
    """Files of each folder that has more than it may; paths are relative to the checkout."""
    rooms = Counter(path.parent for path in paths if path.name not in ("__init__.py", "conftest.py"))
    return {
        room: files
        for room, files in rooms.items()
        if files > FULLER.get(room.as_posix(), (MAX_FILES, ""))[0]
    }


def ours() -> list[Path]:
    """Tracked files and those that would be added; not what git ignores. Relative to the current folder."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "*.py"]
    listed = subprocess.run(command, capture_output=True, check=True, text=True)
    return [path for path in map(Path, filter(None, listed.stdout.split("\0"))) if path.is_file()]


def main(arguments: list[str]) -> int:
    all_ours = ours()
    long = too_long(map(Path, arguments) if arguments else all_ours)
    for path, lines in sorted(long.items()):
        print(f"{path}: {lines} lines, more than {MAX_LINES}")
    full = too_full(all_ours)
    for room, files in sorted(full.items()):
        print(f"{room}: {files} files, more than {FULLER.get(room.as_posix(), (MAX_FILES,))[0]}")
    return bool(long or full)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
