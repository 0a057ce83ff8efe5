"""What the prefix index's native part is built of, and the command that builds it ahead of the first use.

    python -m microserve.kvcache.prefix.build [--ahead] [--package | --into DIR] [--zig]

Owns the list of its sources; ``kernels/host_object.py`` does the rest. Needs the standard library only.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from microserve.kernels.cpu.compiler import find_zig
from microserve.kernels.host_object import HostSource, build, put
from microserve.kernels.kernel_cache import KernelUnavailable

_SOURCES = Path(__file__).parent / "native"
SOURCE = HostSource(
    "prefix-index",
    _SOURCES / "module.cc",
    (_SOURCES / "sha256.h", _SOURCES / "table.h"),
    foreign=Path(sysconfig.get_path("include")) / "Python.h",  # the package python3-dev has it, say
)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m microserve.kvcache.prefix.build")
    parser.add_argument("--ahead", action="store_true", help="fail in no case")
    parser.add_argument("--package", action="store_true", help="put it into the package: for all users")
    parser.add_argument("--into", type=Path, metavar="DIR", help="put it there, and older ones away")
    parser.add_argument("--zig", action="store_true", help="by the package ziglang, for glibc 2.28 and later")
    options = parser.parse_args(arguments)
    into = SOURCE.prebuilt if options.package else options.into
    try:
        zig = find_zig() if options.zig else None
        if options.zig and zig is None:
            raise KernelUnavailable("no ziglang in this environment")
        path = put(SOURCE, into, zig) if into else build(SOURCE)
    except (KernelUnavailable, OSError, subprocess.SubprocessError) as error:
        print(f"== prefix index: no native part: {error}; it runs in Python", file=sys.stderr)
        return 0 if options.ahead else 1
    if not options.ahead:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
