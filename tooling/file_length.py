"""No Python file is longer than 400 lines: ``make check``, the commit hook and a test ask this one script.

    python tooling/file_length.py [FILE ...]     without files: all that git knows or would add

Prints those that are too long; exit code 1 if there is one. Knows the limit and nothing of what is in a file.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

MAX_LINES = 400


def too_long(paths: Iterable[Path]) -> dict[Path, int]:
    """Lines of each file that has more than :data:`MAX_LINES`; links count where they lead."""
    lengths = {path: len(path.read_bytes().splitlines()) for path in paths if not path.is_symlink()}
    return {path: lines for path, lines in lengths.items() if lines > MAX_LINES}


def ours() -> list[Path]:
    """Tracked files and those that would be added; not what git ignores. Relative to the current folder."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "*.py"]
    listed = subprocess.run(command, capture_output=True, check=True, text=True)
    return [path for path in map(Path, filter(None, listed.stdout.split("\0"))) if path.is_file()]


def main(arguments: list[str]) -> int:
    found = too_long(map(Path, arguments) if arguments else ours())
    for path, lines in sorted(found.items()):
        print(f"{path}: {lines} lines, more than {MAX_LINES}")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
