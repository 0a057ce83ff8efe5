"""What native codecs are built of, and the command that builds them ahead of the first use.

    python -m microserve.kernels.codec.build [--ahead] [--package | --into DIR] [--zig]

Owns the list of their sources; ``kernels/host_object.py`` does the rest. Needs the standard library only.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from microserve.kernels.host_command import run
from microserve.kernels.host_object import HostSource

_SOURCES = Path(__file__).parent / "native"
SOURCE = HostSource(
    "kv-codec",
    _SOURCES / "module.cc",
    (
        *(_SOURCES / name for name in ("bytes.h", "halves.h", "job.h", "levels.h", "payload.h", "rans.h")),
        Path(__file__).parents[1] / "cpu/native/door/cpu.h",
    ),
    # Which roundings there are is written in the sources, and not for the compiler to choose.
    flags=("-ffp-contract=off", "-fno-math-errno", "-Wno-psabi"),
)


def main(arguments: Sequence[str]) -> int:
    without = "codecs of KV: not native, they run in numpy"
    return run("python -m microserve.kernels.codec.build", SOURCE, without, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
