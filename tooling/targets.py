"""``make help``: the targets of the Makefile with the first sentence of the comment above each.

python tooling/targets.py             print them; needs nothing but Python
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

MAKEFILE = Path(__file__).resolve().parents[1] / "Makefile"
TARGET = re.compile(r"(?P<name>[a-z][a-z-]*):(?!=)")
INNER = frozenset({"moved"})
"""Not to be asked for."""


def targets(makefile: str) -> list[tuple[str, str]]:
    """Name and sentence, in the order of the file; a target without a comment has an empty one."""
    found: list[tuple[str, str]] = []
    comment: list[str] = []
    for line in makefile.splitlines():
        if line.startswith("# "):
            comment.append(line[2:])
            continue
        target = TARGET.match(line)
        if target and target["name"] not in INNER:
            found.append((target["name"], first_sentence(" ".join(comment))))
        if not re.match(r"[A-Z_]+ ?[:?]?=", line):  # a variable may stand between a comment and its target
            comment = []
    return found


def first_sentence(text: str) -> str:
    """Up to the first full stop, colon or semicolon that ends one."""
    return re.split(r"(?<=[^.])[.:;](?:\s|$)", text, maxsplit=1)[0].strip()


def main() -> int:
    rows = targets(MAKEFILE.read_text(encoding="utf-8"))
    width = max(len(name) for name, _ in rows)
    for name, sentence in rows:
        print(f"  make {name:<{width}}  {sentence}")
    print("\nARGS='...' goes on to what a target runs; first: make up")
    return 0


if __name__ == "__main__":
    sys.exit(main())
