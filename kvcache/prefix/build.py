"""What the prefix index's native part is built of, and the command that builds it ahead of the first use.

    python -m microserve.kvcache.prefix.build [--ahead] [--package | --into DIR] [--zig]

Owns the list of its sources; ``kernels/host_object.py`` does the rest. Needs the standard library only.
"""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from microserve.kernels.host_command import run
from microserve.kernels.host_object import HostSource

_SOURCES = Path(__file__).parent / "native"
SOURCE = HostSource(
    "prefix-index",
    _SOURCES / "module.cc",
    (_SOURCES / "sha256.h", _SOURCES / "table.h"),
    foreign=Path(sysconfig.get_path("include")) / "Python.h",  # the package python3-dev has it, say
)


def main(arguments: Sequence[str]) -> int:
    without = "prefix index: no native part, it runs in Python"
    return run("python -m microserve.kvcache.prefix.build", SOURCE, without, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
