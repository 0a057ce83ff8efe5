"""Compilers that are shell scripts: what they are asked is counted, what they make is text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

SCRIPT = """#!/bin/sh
here="${0%%/*}/.."
for last; do :; done
case "$last" in
--version) echo "$0, version %(version)s"; exit ;;
*.probe) exit 1 ;;  # knows no newer instructions
*.o) echo "${0##*/}" >> "$here/compiled"; %(compile)s ;;
*) echo "${0##*/}" >> "$here/linked"; %(link)s ;;
esac
"""
COMPILE = 'echo part > "$last"'
LINK = 'echo "an object by ${0##*/}" > "$last"'
WAIT = 'echo > "$here/inside"; read -r _ < "$here/go"; '
"""Before it goes on: tells by one pipe, and waits for the other."""


class Compilers:
    """Of a directory ``bin`` in ``root``, with a cache beside it."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.cache = root / "cache"

    def __call__(self, *names: str, **how: str) -> dict[str, str]:
        """An environment with these compilers and no others, all of one kind (:meth:`add`)."""
        programs = self._root / "bin"
        programs.mkdir(exist_ok=True)
        for old in programs.iterdir():
            old.unlink()
        for name in names:
            self.add(name, **how)
        return {"PATH": str(programs), "MICROSERVE_KERNEL_CACHE": str(self.cache)}

    def add(self, name: str, *, compile: str = COMPILE, link: str = LINK, version: str = "1") -> None:
        program = self._root / "bin" / name
        program.write_text(SCRIPT % {"compile": compile, "link": link, "version": version})
        program.chmod(0o755)

    @property
    def num_compiled(self) -> int:
        """Files."""
        return self._count("compiled")

    @property
    def num_linked(self) -> int:
        """Objects."""
        return self._count("linked")

    def objects(self) -> list[Path]:
        """In the cache."""
        return sorted(self.cache.glob("*.so"))

    def others(self) -> Iterator[Path]:
        """What else is there, but for locks."""
        return (path for path in self.cache.iterdir() if path.suffix not in (".so", ".lock"))

    def _count(self, what: str) -> int:
        file = self._root / what
        return len(file.read_text().splitlines()) if file.exists() else 0
